"""A tiny BERT whose biases are not zero, and padded sentences for it."""

import torch
from transformers import BertConfig, BertForSequenceClassification

LAYERS, HEADS, HIDDEN, NEURONS = 4, 4, 32, 64
SEP, PAD = 3, 0


def tiny(**changes) -> BertForSequenceClassification:
    """A random BERT with 4 layers, 4 heads, and biases that are not zero."""
    config = BertConfig(
        vocab_size=100, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS, intermediate_size=NEURONS,
        num_labels=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, classifier_dropout=0.0,
    )  # fmt: skip
    config.update(changes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BertForSequenceClassification(config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "LayerNorm" not in name:
                    parameter.normal_(0, 0.2)
    return model


def make_batch(size: int = 3, length: int = 7, seed: int = 0) -> dict:
    """Random sentences; each ends in [SEP], later ones are shorter and padded."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 100, (size, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(size):
        end = length - row
        ids[row, end - 1], ids[row, end:], mask[row, end:] = SEP, PAD, 0
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.randint(0, 2, (size,), generator=generator)}


def one_sentence(batch: dict, row: int) -> dict:
    """One sentence of a batch without its padding."""
    length = int(batch["attention_mask"][row].sum())
    return {name: batch[name][row : row + 1, :length] for name in ("input_ids", "attention_mask")}


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)
