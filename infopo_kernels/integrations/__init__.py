"""The library inside transformers, TRL and PEFT. `infopo_kernels` itself imports nothing from here.

transformers.py       attach_linear_logps: log-probabilities and the loss from inside a model's own forward
heads.py              ... the head: it hands over its input and returns log-probabilities
sealed.py             ... keeps values float64 inside wrappers that cast
packing_probe.py      ... whether a model keeps the sequences of a packed row apart
logit_transform.py    softcap and scale of a model's logits, read from its configuration, checked on the model
preferences.py        preference rows to features: one way for all trainers and commands
preference_rows.py    ... formats, checks and files of rows
chat_turns.py         ... where turns begin and end in what a chat template renders
model_limits.py       ... ids and lengths that a model can take
collators.py          features to batches, padded and packed
references.py         files of reference log-probabilities, and the identity of the model that they belong to
adapters.py           PEFT's adapters: whose parameters, whether they change the model, directories that hold one
step.py               one step: reference, loss, metrics
split_sequences.py    ... sequences that Accelerate cuts: context parallelism and Ulysses
preference_training.py  what both trainers share around it: checks, metrics of an evaluation, pairs counted once
first_step.py         the check that the policy equals the reference at the first step
randomness.py         switches off dropout and other noise
trainer.py            PreferenceTrainer: InfoPO on transformers' own Trainer
trl.py                InfoPOTrainer, InfoPOConfig: InfoPO on TRL's DPOTrainer
"""
