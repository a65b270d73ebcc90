"""The contrastive losses: those of transformers where captions differ; what equal and public captions change."""

import math

import pytest
import torch
import torch.nn.functional as F
from transformers.models.clip.modeling_clip import contrastive_loss

from hf_dpclip.gradients.inputs import caption_keys
from hf_dpclip.losses import PublicEmbeddings, contrastive_losses, sigmoid_losses


SCALE, BIAS = math.log(5.0), -2.0
SIZES = [1, 3, 2]


def embeddings(rows: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, 4, generator=generator), dim=1).requires_grad_()


def scalars(value: float, count: int) -> torch.Tensor:
    return torch.full((count,), value)


def public(images: int, texts: int, captions_of_images=None, captions_of_texts=None) -> PublicEmbeddings:
    keys = torch.arange(1000, 1000 + texts) if captions_of_texts is None else torch.tensor(captions_of_texts)
    of_images = None if captions_of_images is None else torch.tensor(captions_of_images)
    return PublicEmbeddings(embeddings(images, 7).detach(), embeddings(texts, 8).detach(), of_images, keys)


def info_nce(images, texts, sizes, **options):
    return contrastive_losses(images, texts, scalars(SCALE, len(sizes)), sizes, **options)


def sigmoid(images, texts, sizes, **options):
    return sigmoid_losses(images, texts, scalars(SCALE, len(sizes)), scalars(BIAS, len(sizes)), sizes, **options)


def their_info_nce(images, texts):
    similarity = math.exp(SCALE) * texts @ images.T
    return (contrastive_loss(similarity) + contrastive_loss(similarity.T)) / 2


def their_sigmoid(images, texts):
    logits = math.exp(SCALE) * texts @ images.T + BIAS
    return -F.logsigmoid((2 * torch.eye(len(logits)) - 1) * logits).sum(dim=1).mean()


@pytest.mark.parametrize(("ours", "theirs"), [(info_nce, their_info_nce), (sigmoid, their_sigmoid)])
def test_each_microbatch_has_the_loss_of_transformers(ours, theirs):
    images, texts = embeddings(6, 0), embeddings(6, 1)
    expected = [theirs(*each) for each in zip(images.split(SIZES), texts.split(SIZES))]
    assert torch.allclose(ours(images, texts, SIZES), torch.stack(expected), atol=1e-5)


@pytest.mark.parametrize("loss", [info_nce, sigmoid])
def test_what_is_not_finite_stays_in_its_microbatch(loss):
    images, texts = embeddings(6, 0), embeddings(6, 1)
    broken = images.detach().clone()
    broken[2] = math.nan
    broken.requires_grad_()
    losses = loss(broken, texts, SIZES)
    losses.sum().backward()
    assert losses.isfinite().tolist() == [True, False, True]
    assert broken.grad[[0, 4, 5]].isfinite().all()


def test_equal_captions_are_no_negatives():
    """By hand: of three pairs, two with the same caption."""
    images, texts = embeddings(3, 0), embeddings(3, 1)
    logits = math.exp(SCALE) * texts @ images.T
    rivals = [[0, 2], [1, 2], [0, 1, 2]]
    terms = [
        (logits[i, rivals[i]].logsumexp(0) + logits[rivals[i], i].logsumexp(0)) / 2 - logits[i, i] for i in range(3)
    ]
    loss = info_nce(images, texts, [3], captions=torch.tensor([4, 4, 9]))
    assert torch.allclose(loss, torch.stack(terms).mean().view(1), atol=1e-5)


def test_equal_captions_are_answered_with_yes():
    images, texts = embeddings(2, 0), embeddings(2, 1)
    logits = math.exp(SCALE) * texts @ images.T + BIAS
    loss = sigmoid(images, texts, [2], captions=torch.tensor([4, 4]))
    assert torch.allclose(loss, -F.logsigmoid(logits).sum(dim=1).mean().view(1), atol=1e-5)


def test_public_negatives_of_one_pair_by_hand():
    image, text = embeddings(1, 0), embeddings(1, 1)
    negatives = public(images=2, texts=3)
    scale = math.exp(SCALE)
    own = scale * (image * text).sum()
    over_texts = torch.cat([own.view(1), scale * (negatives.texts @ image[0])]).logsumexp(0)
    over_images = torch.cat([own.view(1), scale * (negatives.images @ text[0])]).logsumexp(0)
    expected = (over_texts + over_images) / 2 - own
    assert torch.allclose(info_nce(image, text, [1], public=negatives), expected.view(1), atol=1e-5)


def test_one_pair_without_negatives_teaches_nothing():
    image, text = embeddings(1, 0), embeddings(1, 1)
    info_nce(image, text, [1]).sum().backward()
    assert float(image.grad.norm()) < 1e-5


@pytest.mark.parametrize("loss", [info_nce, sigmoid])
def test_microbatches_are_contrasted_with_the_public_ones_only_beside_themselves(loss):
    images, texts, negatives = embeddings(6, 0), embeddings(6, 1), public(2, 3)
    alone = [loss(*each, [len(each[0])], public=negatives) for each in zip(images.split(SIZES), texts.split(SIZES))]
    assert torch.allclose(loss(images, texts, SIZES, public=negatives), torch.cat(alone), atol=1e-5)


def test_a_public_caption_that_is_the_pairs_own_is_no_negative():
    image, text, captions = embeddings(1, 0), embeddings(1, 1), torch.tensor([1001])
    with_own = public(images=0, texts=3)
    others = [0, 2]
    without = PublicEmbeddings(
        with_own.images, with_own.texts[others], None, with_own.captions_of_texts[torch.tensor(others)]
    )
    losses = [info_nce(image, text, [1], captions=captions, public=each) for each in (with_own, without)]
    assert torch.allclose(*losses, atol=1e-6)


def test_a_public_image_whose_caption_is_the_pairs_own_is_no_negative():
    image, text, captions = embeddings(1, 0), embeddings(1, 1), torch.tensor([1001])
    negatives = public(images=3, texts=3, captions_of_images=[1000, 1001, 1002])
    others = [0, 2]
    keys = negatives.captions_of_texts[torch.tensor(others)]
    without = PublicEmbeddings(negatives.images[others], negatives.texts[others], keys, keys)
    losses = [info_nce(image, text, [1], captions=captions, public=each) for each in (negatives, without)]
    assert torch.allclose(*losses, atol=1e-6)


@pytest.mark.parametrize(
    ("first", "second", "equal"),
    [
        ([7, 1, 2, 9], [7, 1, 2, 9, 0, 0], True),  # padded with the padding token
        ([7, 1, 2, 9], [7, 1, 2, 9, 9, 9], True),  # padded with the last token
        ([7, 1, 2, 9], [7, 2, 1, 9], False),
        ([7, 1, 2, 9], [7, 1, 2, 8], False),
        ([7, 1, 9, 2, 9], [7, 1, 3, 2, 9], False),
        ([7, 1, 2, 9], [7, 1, 2, 3, 9], False),
        ([7, 1, 1, 9], [7, 1, 9, 9], False),
        ([7, 9], [7, 1, 9], False),
        ([5, 7, 0, 0], [5, 9, 0, 0], False),  # the padding token ends the text
        ([5, 7, 0, 0], [5, 7, 0, 0, 0], True),
    ],
)
def test_captions_are_told_apart_however_they_are_padded(first, second, equal):
    keys = [int(caption_keys({"input_ids": torch.tensor([tokens])}, pad_token_id=0)) for tokens in (first, second)]
    assert (keys[0] == keys[1]) is equal


def test_captions_are_told_apart_with_a_mask():
    masked = {"input_ids": torch.tensor([[7, 1, 9, 5]]), "attention_mask": torch.tensor([[1, 1, 1, 0]])}
    plain = {"input_ids": torch.tensor([[7, 1, 9]])}
    assert torch.equal(caption_keys(masked, pad_token_id=0), caption_keys(plain, pad_token_id=0))
