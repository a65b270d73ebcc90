"""BatchNorm with frozen statistics."""

from torch import nn


class _Frozen(nn.Module):
    """Stays in evaluation mode: every record is normalised with the same constants, whoever else is in its batch."""

    def train(self, mode: bool = True):
        return super().train(False)


class _FrozenBatchNorm1d(_Frozen, nn.BatchNorm1d):
    pass


class _FrozenBatchNorm2d(_Frozen, nn.BatchNorm2d):
    pass


class _FrozenBatchNorm3d(_Frozen, nn.BatchNorm3d):
    pass


class _FrozenSyncBatchNorm(_Frozen, nn.SyncBatchNorm):
    pass


_FROZEN = {
    nn.BatchNorm1d: _FrozenBatchNorm1d,
    nn.BatchNorm2d: _FrozenBatchNorm2d,
    nn.BatchNorm3d: _FrozenBatchNorm3d,
    nn.SyncBatchNorm: _FrozenSyncBatchNorm,
}


def freeze_batch_norm(model: nn.Module) -> nn.Module:
    """Lets every BatchNorm layer normalise with its present running statistics, in training too.

    BatchNorm in training mode updates its running statistics from the private records, outside the mechanism, and
    [`DPCLIPTrainer`] refuses it. With the statistics of the pretrained weights as constants, it is an ordinary linear
    layer, whose scale and shift can still be trained. Names and values of all weights stay as they are, so that
    `from_pretrained` loads what was saved.

    Args:
        model (`nn.Module`): changed in place.

    Returns the model.

    Example:
        ```python
        model = freeze_batch_norm(ClapModel.from_pretrained("laion/clap-htsat-unfused"))
        ```
    """
    for module in model.modules():
        if type(module) in _FROZEN:
            module.__class__ = _FROZEN[type(module)]
            module.eval()
    return model
