"""Survey section 4.4: K-29, MobileBERT. Bottleneck layers as wide outside as the teacher's, taught one after another.

Sun et al. 2020 (arXiv 2004.02984). The parts are `utils.parts.MobileBertLayer` and `utils.parts.TrigramEmbeddings`.
"""

import torch
from torch import nn

from utils import parts
from utils.distillation.extreme import unfrozen
from utils.distillation.layers import attention_relation, hidden_states
from utils.distillation.objective import LayerMap, Objective, as_loss
from utils.distillation.outputs import Teacher
from utils.distillation.students import from_layers, principal_directions, starting_layers
from utils.trials import Trial


def mobile_bert(teacher: nn.Module, num_layers: int, layer: dict, embedding_size: int | None = 128, seed: int = 0) -> nn.Module:
    """A BERT of bottleneck layers, as wide between its layers as the teacher, so that feature maps can be compared one by one.

    `layer` holds the options of `parts.MobileBertLayer` (without the hidden size); `embedding_size` that of the trigram
    block, None keeps the teacher's block. Pooler and classifier are the teacher's, as in Sun et al. 2020 (arXiv 2004.02984),
    survey 4.4; there the teacher has inverted bottlenecks and is 512 wide, here it is the baseline. Raises ValueError for too
    many layers.
    """
    student = from_layers(teacher, starting_layers(len(teacher.bert.encoder.layer), num_layers, "first"))
    device = next(teacher.parameters()).device
    if teacher.config.hidden_size % layer["num_heads"]:
        raise ValueError(f"num_heads must divide the hidden size {teacher.config.hidden_size} too, got {layer['num_heads']}")
    student.config.update({"num_attention_heads": layer["num_heads"], "intermediate_size": layer["neurons"]})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = [parts.MobileBertLayer(hidden_size=teacher.config.hidden_size, **layer) for _ in range(num_layers)]
        if embedding_size is not None:
            student.bert.embeddings = trigram_embeddings(teacher, embedding_size)
    student.bert.encoder.layer = nn.ModuleList(made)
    return student.to(device).eval()


@torch.no_grad()
def trigram_embeddings(teacher: nn.Module, size: int) -> parts.TrigramEmbeddings:
    """A trigram block that begins as the teacher's block, but for word vectors of rank `size`: the neighbours start with no
    say.
    """
    source = teacher.bert.embeddings
    table, hidden = source.word_embeddings.weight, teacher.config.hidden_size
    block = parts.TrigramEmbeddings(len(table), size, hidden, source.position_embeddings.num_embeddings, "layer_norm")
    directions = principal_directions(table, size)
    block.word_embeddings.weight.copy_(table.float() @ directions)
    block.word_embeddings.weight[0].zero_()
    block.embedding_transformation.weight.zero_()
    block.embedding_transformation.weight[:, size : 2 * size].copy_(directions)
    for name in ("position_embeddings", "token_type_embeddings", "LayerNorm"):
        getattr(block, name).load_state_dict(getattr(source, name).state_dict())
    return block


def layer_transfer(student_layer: int, teacher_layer: int) -> Objective:
    """One layer's knowledge: mean squared difference of the feature maps, and KL of the attention of each head.

    Needs as many heads as the teacher has, and its hidden size.
    """
    return hidden_states({student_layer: teacher_layer}) + attention_relation(student_layer, teacher_layer)


def progressive_transfer(trial: Trial, teacher: Teacher, layers: LayerMap, steps: int, **options) -> list[int]:
    """Teach the student's layers one after another from the bottom, those below frozen; `steps` each. Returns what learned
    each time.

    The first takes the embeddings along. Afterwards the student is distilled and fine-tuned as a whole. Options go to
    `trial.recover`. Raises ValueError for a map that does not fit, or is not one from every layer of the student.
    """
    block = trial.model.bert
    if sorted(layers) != list(range(1, len(block.encoder.layer) + 1)):
        raise ValueError(f"every layer of the student (1..{len(block.encoder.layer)}) learns once, got {sorted(layers)}")
    learned = []
    for own, given in sorted(layers.items()):
        modules = [block.encoder.layer[own - 1], *([block.embeddings] if own == 1 else [])]
        with unfrozen(trial.model, modules):
            parameters = [parameter for parameter in trial.model.parameters() if parameter.requires_grad]
            trial.recover(steps, loss=as_loss(layer_transfer(own, given), teacher), train_embeddings=True,
                          parameters=[{"params": parameters}], **options)  # fmt: skip
        learned.append(sum(parameter.numel() for parameter in parameters))
    return learned
