"""What an evaluation reads of a checkpoint before any worker starts."""

import pytest
from untrained_checkpoint import save_untrained_nano

from vla.errors import UserError
from vla.evaluation.policy_source import CheckpointSource


@pytest.mark.parametrize(
    ("content", "sentence"),
    [(None, "does not exist"), ('{"step":', "is not valid JSON"), ("[]", "does not hold a JSON object")],
)
def test_a_manifest_that_is_broken_is_said_in_one_sentence(tmp_path, content, sentence):
    folder = save_untrained_nano(tmp_path / "policy")
    source = CheckpointSource.open(folder)
    manifest = source.path / "manifest.json"
    manifest.unlink() if content is None else manifest.write_text(content)
    with pytest.raises(UserError, match=sentence):
        _ = source.manifest
