"""One run of a model under the dispatch mode, and what is put back after it."""
