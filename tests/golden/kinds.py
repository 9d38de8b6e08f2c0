"""All kinds of golden file: KINDS[kind](arrays) raises AssertionError where the project does not reproduce an output."""

from __future__ import annotations

from tests.golden import (
    augmentation,
    byol_family,
    data_rules,
    detection,
    detection_models,
    detection_protocol,
    dino_family,
    dino_optim,
    distillation_family,
    evaluation,
    exports,
    gram_family,
    ibot_family,
    ibot_masks,
    ibot_steps,
    joint_embedding,
    joint_embedding_optim,
    layer_decay,
    linear_family,
    mocov3_family,
    momentum_family,
    segmentation,
    sere_family,
    sere_steps,
    vit_family,
    w2ssl_family,
)

KINDS = {
    **augmentation.KINDS,
    **byol_family.KINDS,
    **data_rules.KINDS,
    **detection.KINDS,
    **detection_models.KINDS,
    **detection_protocol.KINDS,
    **dino_family.KINDS,
    **dino_optim.KINDS,
    **distillation_family.KINDS,
    **evaluation.KINDS,
    **exports.KINDS,
    **gram_family.KINDS,
    **ibot_family.KINDS,
    **ibot_masks.KINDS,
    **ibot_steps.KINDS,
    **joint_embedding.KINDS,
    **joint_embedding_optim.KINDS,
    **layer_decay.KINDS,
    **linear_family.KINDS,
    **mocov3_family.KINDS,
    **momentum_family.KINDS,
    **segmentation.KINDS,
    **sere_family.KINDS,
    **sere_steps.KINDS,
    **vit_family.KINDS,
    **w2ssl_family.KINDS,
}

# Kinds whose issues are not built yet.
PENDING: frozenset[str] = frozenset()
