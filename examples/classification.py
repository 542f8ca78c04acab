"""Classify texts of different lengths with a BERT, and evaluate it.

The model's own loss is a mean over rows; the library proves that on the first batch. Use
`AutoModelForSequenceClassification.from_pretrained` and your own rows in place of the tiny ones.
"""

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification

from accum_trainer import Accumulator


def collate(rows):
    ids = pad_sequence([row["ids"] for row in rows], batch_first=True)
    labels = torch.tensor([row["label"] for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels}


def text(label):
    """Tokens of one of two topics: low or high ones are more frequent."""
    words = torch.randint(1, 33, (int(torch.randint(4, 20, ())),))
    return {"ids": words + 31 * label, "label": label}


torch.manual_seed(0)
rows = [text(number % 2) for number in range(120)]
train, held_back = rows[:100], rows[100:]
sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
model = BertForSequenceClassification(BertConfig(**sizes, num_attention_heads=2, num_labels=2))
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
acc = Accumulator(micro_batch_size=4, global_batch_size=16, max_grad_norm=1.0)
model, optimizer = acc.prepare(model, optimizer)
windows = acc.windows(DataLoader(train, batch_size=4, shuffle=True, collate_fn=collate))

for epoch in range(3):
    model.train()
    for window in windows:
        for batch in window:
            with acc.accumulate(model):
                acc.backward(model(**batch).loss)
        update = acc.step(optimizer)
    model.eval()
    with torch.no_grad():
        batch = {key: value.to(acc.device) for key, value in collate(held_back).items()}
        accuracy = (model(**batch).logits.argmax(1) == batch["labels"]).float().mean()
    print(f"epoch {epoch}  loss {update.loss:.4f}  accuracy {accuracy:.2f}")
