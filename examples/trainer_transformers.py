"""Prunes a language model to 70% of its FLOPs while the Trainer of Transformers trains it."""

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from taylor_kernels.integrations.transformers import PruningCallback

sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 64}
model = BertForSequenceClassification(BertConfig(vocab_size=99, num_hidden_layers=2, **sizes))
tokens = torch.randint(99, (64, 12))
data = [{"input_ids": row, "labels": row[0] % 2} for row in tokens]
arguments = TrainingArguments("runs", num_train_epochs=50, report_to="none")
trainer = Trainer(model, arguments, train_dataset=data)
pruning = PruningCallback(trainer, {"input_ids": tokens[:1]}, flops=0.7, every=2, per_step=0.1)
trainer.add_callback(pruning)
trainer.train()
print(pruning.pruner.widths)
