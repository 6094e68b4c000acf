"""Every reader of a JSON file names the file and the way out, whatever it finds in the file's place."""

from pathlib import Path

import pytest

from vla.contract import CONTRACT_FILE, ContractError, PolicyContract
from vla.errors import UserError
from vla.evaluation.plan import PLAN_FILE, Plan
from vla.json_file import load_json
from vla.training.config import RECORD_FILE, TrainConfig, open_run
from vla.training.dataset import open_demonstrations

READERS = {
    "any": ("file.json", lambda folder: load_json(folder / "file.json"), "copy it again"),
    "contract": (CONTRACT_FILE, PolicyContract.load, "copy the checkpoint again"),
    "plan": (PLAN_FILE, Plan.load, "evaluate again"),
    "dataset": ("meta/info.json", open_demonstrations, "copy the dataset again"),
    "run": (RECORD_FILE, lambda out: open_run(TrainConfig(out=out, resume=True)), "cannot be resumed"),
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize(
    ("content", "problem"),
    [("[]", "does not hold a JSON object"), ('{"a":', "is not valid JSON"), ("\udc80", "is not valid JSON")],
    ids=["a list", "cut off", "not text"],
)
def test_what_is_no_json_object_is_one_sentence(name, content, problem, tmp_path):
    file, read, remedy = READERS[name]
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=f"{Path(file).name} {problem}.*{remedy}"):
        read(tmp_path)


@pytest.mark.parametrize("name", READERS)
def test_a_folder_in_its_place_is_one_sentence(name, tmp_path):
    file, read, remedy = READERS[name]
    (tmp_path / file).mkdir(parents=True)
    with pytest.raises(UserError, match=f"cannot be read.*{remedy}"):
        read(tmp_path)


def test_the_reader_chooses_the_kind_of_error(tmp_path):
    with pytest.raises(ContractError, match="does not exist"):
        PolicyContract.load(tmp_path)
