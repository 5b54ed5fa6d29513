"""The rival: DeepSpeed's own ALST on the dense model: `hybridsp bench alst`.

`command` takes its steps as `bench step` takes ours, `model` is the model as ALST wants it.
"""
