"""Growing many trees by a level, from logits to the rows of the next pass; `levels.GrowLevel` is the contract.

The same in PyTorch, on any device: `speculation.batch_growth` and the layout of the rows in `services.speculator`.
"""
