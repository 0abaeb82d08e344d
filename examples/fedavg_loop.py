"""Federated averaging in plain PyTorch, with a server that keeps one client's answer.

    python examples/fedavg_loop.py [--network mlp|cnn] [--local-steps K] [--photographs 1|2]

Three clients, each with its own photographs, train the server's network for K steps of SGD, one
photograph a step in turn; the server averages their weights, and starts the next round. Of the last
round it keeps what it sent (before.pt) and what client 0 answered (after.pt). What the difference
gives away: docs/federated.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from federated_networks import CLIENTS, NETWORKS, data_of, initial
from torch import Tensor, nn
from torch.nn import functional as F

WATCHED = 0
State = dict[str, Tensor]


def train(model: nn.Module, images: Tensor, labels: Tensor, lr: float, steps: int) -> State:
    """Take ``steps`` steps of plain SGD, one photograph (3, H, W) each; return the weights."""
    optimiser = torch.optim.SGD(model.parameters(), lr=lr)
    for step in range(steps):
        n = step % len(images)
        optimiser.zero_grad()
        F.cross_entropy(model(images[n : n + 1]), labels[n : n + 1]).backward()
        optimiser.step()
    return copied(model)


def copied(model: nn.Module) -> State:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def run_rounds(
    network: str, *, lr: float, local_steps: int, photographs: int, rounds: int
) -> tuple[State, State]:
    """Run FedAvg; return the weights that the last round began with, and the watched answer."""
    model = initial(network)
    before = after = copied(model)
    for _ in range(rounds):
        before = copied(model)
        answers = []
        for client in range(CLIENTS):
            model.load_state_dict(before)
            images, labels = data_of(client, photographs)
            answers.append(train(model, images, labels, lr, local_steps))
        after = answers[WATCHED]
        model.load_state_dict(
            {name: torch.stack([a[name] for a in answers]).mean(0) for name in before}
        )
    return before, after


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", choices=NETWORKS, default="mlp")
    parser.add_argument("--lr", type=float, default=0.1, help="the clients' learning rate")
    parser.add_argument("--local-steps", type=int, default=1, help="steps of SGD a round")
    parser.add_argument("--photographs", type=int, default=1, choices=(1, 2), help="a client's")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path(), help="where the weights are kept")
    given = parser.parse_args()
    before, after = run_rounds(
        given.network,
        lr=given.lr,
        local_steps=given.local_steps,
        photographs=given.photographs,
        rounds=given.rounds,
    )
    torch.save(before, given.folder / "before.pt")
    torch.save(after, given.folder / "after.pt")
    print(
        f"round {given.rounds} of a {given.network}, {CLIENTS} clients, {given.local_steps} steps "
        f"of SGD each: wrote {given.folder / 'before.pt'} and {given.folder / 'after.pt'}"
    )


if __name__ == "__main__":
    main()
