"""Checkpoints: quantized models written to disk, and read from it, by whoever wrote them.

`saving` and `loading` are what users call; `streaming` quantizes while it loads. The formats have a file each:
`compressed` (compressed-tensors), `native` (qnb's own) and `llama_cpp` (GGUF).
"""
