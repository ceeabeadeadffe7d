"""The training loop.

One step of `loop.Trainer`: `prompts` draws, `collect` has the prompts answered and scored, `rewards` accepts and compares
the answers, `rollouts` repeats that until the step has its samples (`overlap` does so ahead of time), `update` turns the
samples into a gradient, `publish` pushes the weights to the engine.

A rollout is one record on this way, `types.Sample`, with all that is known about it. `update.MicroBatch` holds the samples
of one forward with their layout, `types.TokenBatch` their tokens as methods see them.
"""
