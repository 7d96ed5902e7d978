"""The ops: each file holds one op's public function, its checks and its schema.

`_library` registers them with PyTorch, `_lists` is what those over lists of parameters share, and
`backends.select` chooses the kernels.
"""
