"""Losses that more than one chapter trains with."""

import torch
from torch.nn.functional import kl_div, log_softmax


def soft_target_loss(student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """T^2 KL(softmax(z_t / T) || softmax(z_s / T)), the mean over all but the last axis; zero where the two agree.

    T^2 keeps the gradient's size as T grows: with C classes the loss tends to logit regression divided by C. Its gradient is
    that of the cross-entropy that Hinton, Vinyals and Dean 2015 write. Survey 4.1.
    """
    soft = (teacher_logits / temperature).softmax(-1)
    each = kl_div(log_softmax(student_logits / temperature, -1), soft, reduction="none").sum(-1)
    return temperature**2 * each.mean()
