"""What fedlora's own server makes of a configuration over the cohort's transport, after every round."""

from __future__ import annotations

from dataclasses import dataclass

from flwr.app import ArrayRecord
from torch import Tensor

from fedlora.adapters.slots import AdapterLayout
from fedlora.config import RunConfig
from fedlora.experiments.simulate import CohortTransport, resolve
from fedlora.federation.schedule import make_schedule
from fedlora.federation.server import Server, ServerState, initial_state
from fedlora.federation.sites import encode_training_data, load_simulated_data, make_sites
from fedlora.federation.workbench import build_workbench
from fedlora.privacy.ledger import Ledger
from fedlora.privacy.phases import FINETUNE


@dataclass(frozen=True)
class CohortRun:
    thetas: list[Tensor]
    """After each round of fine-tuning, [P]."""
    state: ServerState
    layout: AdapterLayout

    def arrays(self, number: int) -> dict[str, Tensor]:
        """The slots by name after fine-tuning round `number`, from 1."""
        return {slot.name: self.layout.view(self.thetas[number - 1], slot) for slot in self.layout.slots}


def cohort_run(config: RunConfig) -> CohortRun:
    data = load_simulated_data(config)
    sites = make_sites(config, data, make_schedule(config))
    workbench = build_workbench(resolve(config))
    dataset = encode_training_data(workbench, data)
    thetas: list[Tensor] = []
    server = Server(
        workbench=workbench,
        transport=CohortTransport(workbench=workbench, dataset=dataset, sites=sites, ledger=Ledger.in_memory()),
        evaluate=lambda theta: {},
        on_round=lambda report, state: thetas.append(state.theta.clone()) if report.phase == FINETUNE else None,
    )
    state = server.run(initial_state(workbench, "cohort-run"))
    return CohortRun(thetas, state, workbench.layout)


def tensors(arrays: ArrayRecord) -> dict[str, Tensor]:
    return dict(arrays.to_torch_state_dict())
