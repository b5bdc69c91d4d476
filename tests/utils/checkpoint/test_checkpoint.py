"""Files that are given where weights belong."""

import json

import pytest
import torch

from utils.checkpoint.format import load_weights
from utils.core.errors import UserError


def test_a_file_without_weights_is_a_sentence(tmp_path):
    """Also those beside a checkpoint's weights, for which its folder is the right name."""
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0}), "utf-8")
    torch.save([{"state": {}}], tmp_path / "optimizer.pt")
    torch.save({"shadow": {"w": torch.ones(2)}}, tmp_path / "ema.pt")
    torch.save(torch.ones(2), tmp_path / "tensor.pt")
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(UserError) as error:
            load_weights(path, "raw")
        message = str(error.value)
        assert str(path) in message and "\n" not in message and "step_<n>" in message
    (tmp_path / "manifest.json").write_text("{}", "utf-8")
    with pytest.raises(UserError, match=f"give its folder, {tmp_path}"):
        load_weights(tmp_path / "optimizer.pt", "raw")
    torch.save({"_orig_mod.model.w": torch.ones(2)}, tmp_path / "step_1")
    weights, opened = load_weights(tmp_path / "step_1", "raw")
    assert list(weights) == ["w"] and opened is None
