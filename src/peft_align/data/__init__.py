"""Preference data: read, filtered with every drop counted, split by prompt, put into templates, tokenized."""
