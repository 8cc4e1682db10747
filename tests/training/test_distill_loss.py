"""The distillation loss, against an explicit sum."""

import math

import pytest
import torch
from torch.distributions import Bernoulli, kl_divergence

from hf_prune.errors import ConfigError
from hf_prune.training.distill import DistillCallback
from hf_prune.training.losses import distillation_loss
from hf_prune.training.teacher import check_teacher


def softmax(values, temperature):
    powers = [math.exp(v / temperature) for v in values]
    return [p / sum(powers) for p in powers]


def divergence(student, teacher, temperature):
    p, q = softmax(teacher, temperature), softmax(student, temperature)
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) * temperature**2


def pair(*shape):
    generator = torch.Generator().manual_seed(0)
    return 3 * torch.randn(shape, generator=generator), 3 * torch.randn(shape, generator=generator)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 10.0])
def test_examples(temperature):
    student, teacher = pair(5, 3)
    rows = zip(student.tolist(), teacher.tolist(), strict=True)
    expected = sum(divergence(s, t, temperature) for s, t in rows) / 5
    found = distillation_loss(student, teacher, temperature)
    assert found.item() == pytest.approx(expected, rel=1e-4)


def test_tokens_that_count():
    student, teacher = pair(2, 4, 3)
    counted = torch.tensor([[True, False, True, False], [False, False, False, True]])
    wanted = [(0, 0), (0, 2), (1, 3)]
    expected = sum(divergence(student[i].tolist(), teacher[i].tolist(), 2.0) for i in wanted) / 3
    found = distillation_loss(student, teacher, 2.0, counted)
    assert found.item() == pytest.approx(expected, rel=1e-4)
    student[~counted] = float("nan")
    assert distillation_loss(student, teacher, 2.0, counted).item() == pytest.approx(found.item())


def test_zero_where_they_agree():
    student, _ = pair(5, 3)
    assert distillation_loss(student, student + 7, 2.0).item() == pytest.approx(0, abs=1e-6)
    student, teacher = pair(5, 3)
    assert distillation_loss(student, teacher, 2.0) > 0


def test_gradient_reaches_the_student_only():
    student, teacher = (t.requires_grad_() for t in pair(5, 3))
    distillation_loss(student, teacher.detach(), 2.0).backward()
    p, q = torch.softmax(teacher / 2, -1), torch.softmax(student / 2, -1)
    torch.testing.assert_close(student.grad, 2 * (q - p).detach() / 5)
    assert teacher.grad is None


def test_half_precision_is_summed_in_float32():
    student, teacher = pair(5, 3)
    found = distillation_loss(student.bfloat16(), teacher.bfloat16(), 2.0)
    assert found.dtype == torch.float32


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"temperature": 0.0}, "temperature: Input should be greater than 0"),
        ({"alpha": 1.5}, "alpha: Input should be less than or equal to 1"),
        ({"alpha": -0.1}, "alpha: Input should be greater than or equal to 0"),
        ({"logits": 0.0}, "all distillation weights are 0"),
        ({"relations": 1.0, "relation_of": ()}, "relation_of must name each part once"),
        (
            {"layers": "nearest"},
            "layers: Input should be 'uniform', 'last', 'closest' or 'ordered'",
        ),
        ({"hiden": 1.0}, "hiden: unknown key"),
    ],
)
def test_fields_that_are_not_valid(tiny, fields, text):
    with pytest.raises(ConfigError, match=text):
        DistillCallback(tiny("bert"), **fields)


def test_another_teacher(tiny):
    student, teacher = tiny("bert"), tiny("roberta")
    check_teacher(student, teacher)
    teacher.config.num_labels = 5
    with pytest.raises(ConfigError, match="num_labels is 3 in the student and 5 in the teacher"):
        check_teacher(student, teacher)
    teacher = tiny("roberta")
    teacher.config.vocab_size = 98
    with pytest.raises(ConfigError, match="vocab_size is 99 in the student and 98 in the teacher"):
        check_teacher(student, teacher)


def test_a_teacher_whose_classes_are_in_another_order_is_refused(tiny):
    student, teacher = tiny("bert"), tiny("bert")
    student.config.id2label = {0: "no", 1: "yes", 2: "maybe"}
    check_teacher(student, teacher)  # LABEL_0 and so on say nothing
    teacher.config.id2label = {0: "yes", 1: "no", 2: "maybe"}
    with pytest.raises(
        ConfigError, match="class 0 is 'no' in the student and 'yes' in the teacher"
    ):
        check_teacher(student, teacher)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_callback_mixes_the_losses(tiny, inputs_for, alpha):
    student, teacher, batch = tiny("bert"), tiny("electra"), inputs_for("bert")
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    with torch.no_grad():
        plain = student(**batch)
        distilled = distillation_loss(plain.logits, teacher(**inputs).logits, 2.0)
    for module in student.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    callback = DistillCallback(teacher, 2.0, alpha)
    callback.on_train_begin(None, None, None, model=student)
    student.train()
    mixed = student(**batch).loss
    expected = alpha * distilled + (1 - alpha) * plain.loss
    torch.testing.assert_close(mixed, expected, atol=1e-5, rtol=1e-5)
    mixed.backward()
    assert all(p.grad is None for p in teacher.parameters())
    torch.testing.assert_close(student.eval()(**batch).loss, plain.loss)
    callback.on_train_end(None, None, None)
    torch.testing.assert_close(student.train()(**batch).loss, plain.loss)


def test_decoder_counts_the_positions_that_predict_a_label(tiny, inputs_for):
    """Logits of position t are of token t + 1: the last, and one before -100, do not count."""
    student, teacher, batch = tiny("gpt2"), tiny("gpt2"), inputs_for("gpt2")
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(1.1)
    for module in student.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    with torch.no_grad():
        ours, theirs = student(**inputs).logits, teacher(**inputs).logits
    counted = batch["labels"][:, 1:] != -100
    expected = distillation_loss(ours[:, :-1], theirs[:, :-1], 2.0, counted)
    callback = DistillCallback(teacher, 2.0, 1.0)
    callback.on_train_begin(None, None, None, model=student)
    found = student.train()(**batch).loss
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_flags_and_numbers_are_no_classes(temperature):
    student, teacher = pair(5, 3)
    wanted, ours = (Bernoulli(logits=z / temperature) for z in (teacher, student))
    flags = kl_divergence(wanted, ours).sum(dim=-1).mean() * temperature**2
    found = distillation_loss(student, teacher, temperature, kind="flags")
    torch.testing.assert_close(found, flags, atol=1e-5, rtol=1e-4)
    numbers = (student - teacher).square().sum(dim=-1).mean() / 2
    found = distillation_loss(student, teacher, temperature, kind="numbers")
    torch.testing.assert_close(found, numbers)
    one = distillation_loss(student[:, :1], teacher[:, :1], temperature, kind="numbers")
    assert one > 0, "a softmax of one number would say nothing"
