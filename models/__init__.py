"""Model families that HybridSP ships: plain Hugging Face models that know nothing of parallelism.

Each family is a folder with the two files that Hugging Face copies next to a saved checkpoint.
"""
