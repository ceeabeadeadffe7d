"""The training loop.

One step of `loop.Trainer`: `rollouts` draws prompts, has `collect` answer and score them, and rewards the answers, until the
step has its samples (`overlap` does so ahead of time); `update` turns the samples into a gradient and an optimizer step;
`publish` pushes the weights to the engine.

A rollout is one record on this way, `types.Sample`, with all that is known about it. `update.MicroBatch` holds the samples
of one forward with their layout, `types.TokenBatch` their tokens as methods see them.
"""
