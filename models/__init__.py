"""Which models, tokenizers and data can be trained: loading, families, templates, batches and evaluation."""
