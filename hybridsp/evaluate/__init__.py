"""What a checkpoint can do at length: its loss, what context is worth to it, what it finds again.

Fine-tuning a hybrid is worth the time only if the result still reads: if its loss is near that of
the model it was made from, if it falls with more context and goes on falling past the length the
teacher was trained on, and if a number mentioned half a million tokens ago is found. `hybridsp
eval` asks each of these of several checkpoints on the same held-out tokens:

    text       mean loss on packed documents, and agreement with a teacher     `agreement`
    positions  loss by how many tokens come before, in whole long windows      `positions`
    context    loss of the *same* tokens, seen with less and with more context `positions`
    needle     a number hidden in real text, among other numbers               `needle`

One sequence is cut over all ranks, so what fits is asked for with the GPUs, not with the question;
the answers do not depend on how many there are. Logits exist only of tokens that are scored, a tile
at a time.
"""
