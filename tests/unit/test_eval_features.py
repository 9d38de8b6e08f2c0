import gc
from types import SimpleNamespace

import pytest
import torch

from eval.features import extract
from fastssl.batch import Group, Views
from fastssl.models.backbones import build_backbone
from fastssl.models.weights import load_backbone


def batches(*sizes):
    """Batches whose buffers the loader reuses, as loaders may."""
    start, index, label = 0, torch.empty(8, dtype=torch.long), torch.empty(8, dtype=torch.long)
    for n in sizes:
        index[:n] = torch.arange(start, start + n)
        label[:n] = 10 * index[:n]
        yield SimpleNamespace(index=index[:n], label=label[:n])
        start += n


def images_of(batch) -> Views:
    """One view whose pixels are a function of the sample id."""
    pixels = torch.sin(batch.index[:, None].float() * torch.arange(1, 3 * 32 * 32 + 1)).view(-1, 3, 32, 32)
    none = torch.empty(0)
    return Views(groups=(Group(32, (0,), pixels),), boxes=none, flips=none, source_hw=none, index=batch.index)


def test_extract_keeps_order_and_ids():
    backbone, _ = load_backbone("random:resnet18")
    found = extract(backbone, batches(8, 8, 3), images_of, torch.float32, count=19)
    assert found.index.tolist() == list(range(19)) and found.labels.tolist() == [10 * i for i in range(19)]
    assert found.features.shape == (19, 512) and found.features.dtype == torch.float32
    with torch.no_grad():
        (images,) = images_of(SimpleNamespace(index=torch.arange(19))).per_view()
        torch.testing.assert_close(found.features, backbone(images).pooled)


def test_extract_of_a_transformer_is_its_class_token():
    backbone, _ = load_backbone("random:vit_tiny_patch16")
    found = extract(backbone, batches(8, 3), images_of, torch.float32, count=11)
    with torch.no_grad():
        (images,) = images_of(SimpleNamespace(index=torch.arange(11))).per_view()
        tokens = backbone.embed(images)
        for block in backbone.blocks:
            tokens = block(tokens)
        torch.testing.assert_close(found.features, backbone.norm(tokens)[:, 0])


def test_extract_casts_to_the_autocast_type():
    backbone, _ = load_backbone("random:resnet18")
    seen = []
    backbone.layer1.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    assert extract(backbone, batches(4), images_of, torch.bfloat16, count=4).features.dtype == torch.float32
    extract(backbone, batches(4), images_of, torch.float32, count=4)
    assert seen == [torch.bfloat16, torch.float32]


def test_extract_holds_the_features_once():
    """Each batch's are gone when the next are there."""
    backbone, alive = load_backbone("random:resnet18")[0], []

    def counted():
        for batch in batches(*[4] * 5):
            alive.append(sum(t.shape == (4, 512) for t in gc.get_objects() if type(t) is torch.Tensor))
            yield batch

    assert len(extract(backbone, counted(), images_of, torch.float32, count=20)) == 20
    assert max(alive) == 1


def test_extract_of_an_empty_share():
    found = extract(load_backbone("random:resnet18")[0], batches(), images_of, torch.float32, count=0)
    assert found.features.shape == (0, 512) and len(found) == 0


def test_modes_come_back_after_an_error():
    backbone = build_backbone("resnet18").train()
    backbone.bn1.eval()

    def broken():
        yield from batches(2)
        raise RuntimeError("disk")

    with pytest.raises(RuntimeError, match="disk"):
        extract(backbone, broken(), images_of, torch.float32, count=4)
    assert backbone.training and backbone.layer1.training and not backbone.bn1.training
