"""kdb: where in a language model does what it knows live?"""
