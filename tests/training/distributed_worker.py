"""One of several processes that train one run after the other: ``distributed_worker.py JOBS.json``.

A job is ``{"config": TrainConfig as JSON, "shard": bool}``. accelerate shards on GPUs only, although FSDP2
itself runs on CPUs as well; for a sharded job its state is told so, and everything from there on is its own.
"""

import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

from vla.training import loop
from vla.training.config import _from_json
from vla.training.full_state import is_sharded
from vla.training.trainer import Trainer


def main(jobs: list[dict]) -> None:
    torch.set_num_threads(1)
    make_accelerator, make_trainer = loop._accelerator, Trainer.__init__
    Accelerator.end_training = lambda self: None  # the process group serves all jobs
    for job in jobs:

        def accelerator(config, shard=job["shard"]):
            made = make_accelerator(config)
            if shard:
                made.state.distributed_type = DistributedType.FSDP
                made.state.fsdp_plugin = FullyShardedDataParallelPlugin(
                    fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
                )
            return made

        def trainer(self, *arguments, shard=job["shard"], **options):
            make_trainer(self, *arguments, **options)
            assert is_sharded(self.model) is shard

        loop._accelerator, Trainer.__init__ = accelerator, trainer
        loop.train(_from_json(job["config"]))
        AcceleratorState._reset_state()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
