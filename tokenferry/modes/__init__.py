"""The protocol of each mode, step by step. Independent of the device: no streams, no pointers."""
