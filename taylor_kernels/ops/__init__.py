"""The ops: each file holds one op's public function, its checks, schema and dispatch."""
