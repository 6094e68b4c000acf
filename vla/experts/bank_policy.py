"""A bank that acts: the rows of one batch, each with its own expert."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from vla.errors import UserError
from vla.experts.bank import ExpertBank
from vla.experts.bank_folder import BankFolder
from vla.experts.expert_policy import with_statistics
from vla.experts.lora_expert import BASE_WEIGHTS_FILE
from vla.experts.multi_expert import MultiExpertPolicy
from vla.policy.checkpoint import load_checkpoint


class BankPolicy(MultiExpertPolicy):
    """The base with its experts attached, unmerged; one batched forward whatever the rows' experts are."""

    @classmethod
    def load(cls, folder: Path | BankFolder, device: str = "cpu") -> BankPolicy:
        """Load a bank's folder, verified; raises `UserError` for anything missing, changed or empty."""
        bank = folder if isinstance(folder, BankFolder) else BankFolder.open(folder)
        bank.verify()
        experts = bank.experts()
        if not experts:
            raise UserError(f"The bank {bank.folder} is empty; `vla bank add` adds an expert.")
        base = load_checkpoint(bank.base, device)
        faces = [
            with_statistics(base, expert.contract.statistics) if expert.contract else base
            for expert in experts
        ]
        instructions = [expert.card.instructions for expert in experts]
        policy = cls(base, faces, bank.names, instructions, bank.base_hashes[BASE_WEIGHTS_FILE])
        policy._experts = experts
        policy.bank = ExpertBank(policy.policy)
        for expert in experts:
            policy.bank.add(expert)
        return policy

    @torch.no_grad()
    def forward(self, batch: Mapping[str, Tensor], experts: Sequence[int] | None) -> Tensor:
        """See `MultiExpertPolicy.forward`."""
        if experts is None:
            return self.policy.predict_action_chunk(batch)
        with self.bank.rows(experts):
            return self.policy.predict_action_chunk(batch)

    def task_vector(self, expert: int, tensor: str) -> Tensor | None:
        """See `MultiExpertPolicy.task_vector`."""
        adapter, module = self._experts[expert], tensor.removesuffix(".weight")
        if module in adapter.modules:
            return adapter.update(module).dense()
        if tensor in adapter.full_tensors:
            return adapter.tensors[tensor].float() - self._own(tensor)
        return None

    def task_weight(self, expert: int, tensor: str) -> Tensor:
        """See `MultiExpertPolicy.task_weight`."""
        delta = self.task_vector(expert, tensor)
        return self._own(tensor) if delta is None else self._own(tensor) + delta

    def _own(self, tensor: str) -> Tensor:
        return self.policy.get_parameter(tensor).detach().float().cpu()
