"""Makes the small language model that ships with Headrace: its text, its tokenizer, its training and its evaluation.

Every sentence of the training text is generated here from a seed, so the model can be rebuilt without a download and
shipped without a question about where its data came from. Run the modules from the root of the repository::

    python -m scripts.demo_model.train          # about 45 minutes on two shared CPU cores
    python -m scripts.demo_model.evaluate
"""
