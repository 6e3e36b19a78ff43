"""Find models, read their files, load them, and describe their structure and their tokenizers."""
