"""Model families that HybridSP ships: plain Hugging Face models that know nothing of parallelism.

Each family is a folder whose files Hugging Face copies beside a saved checkpoint.
"""
