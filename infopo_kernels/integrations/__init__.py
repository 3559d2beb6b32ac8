"""Drop-in for the trainers people use. Nothing here is imported by `infopo_kernels` itself.

transformers.py       attach_linear_logps: log-probabilities and the loss from inside a model's own forward
logit_transform.py    what a model does to its logits, from its configuration, checked against the model
collators.py          preference batches, padded and packed
trainer.py            PreferenceTrainer: InfoPO on transformers' own Trainer
trl.py                InfoPOTrainer, InfoPOConfig: InfoPO on TRL's DPOTrainer
"""
