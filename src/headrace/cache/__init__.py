"""The paged KV cache: `block_manager` decides (no torch), `kv_pool` holds the tensors."""
