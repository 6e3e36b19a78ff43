"""Analysis of what the warehouse holds; runs no model and never imports the measuring side."""
