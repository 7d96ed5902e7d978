"""The language-model study: a small Llama on the standard library's sources, pruned four ways."""
