"""Federated learning with Flower, for real: what one round gives a curious server.

    python examples/flower_update.py [--network mlp|cnn] [--lr LR]

A Flower server and three Flower clients, each a process of its own, talk gRPC over the loopback
interface. Every client holds one photograph and its label, and answers the server's weights with
its own after one step of SGD. The server's strategy is Flower's FedAvg; besides averaging it writes
down what it sent (before.pt) and what client 0 answered (after.pt), as a log or a backup would. It
never sees a photograph. The shell pipeline goes on from there: docs/federated.md.

Needs flwr, which asks for Python 3.11: pip install 'gradleak[examples]'.
"""

from __future__ import annotations

import argparse
import logging
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from federated_networks import CLIENTS, NETWORKS, data_of, initial
from torch import nn
from torch.nn import functional as F

WATCHED = 0
Arrays = list[np.ndarray]


def arrays_of(model: nn.Module) -> Arrays:
    """Return a network's state as Flower sends it: arrays without names."""
    return [tensor.cpu().numpy() for tensor in model.state_dict().values()]


def load_arrays(model: nn.Module, arrays: Arrays) -> None:
    named = zip(model.state_dict(), arrays, strict=True)
    model.load_state_dict({name: torch.tensor(array) for name, array in named})


def import_flower() -> Any:
    """Import Flower, without its reports of usage to its makers and with no log but errors."""
    os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
    import flwr
    import flwr.client
    import flwr.server

    logging.getLogger("flwr").setLevel(logging.ERROR)
    return flwr


def run_client(client: int, address: str, network: str, lr: float) -> None:
    """Answer one round; the photograph stays in this process."""
    flwr = import_flower()
    images, labels = data_of(client)

    class Client(flwr.client.NumPyClient):
        """Train one step of plain SGD on the one photograph."""

        def fit(self, parameters: Arrays, config: dict[str, Any]) -> tuple[Arrays, int, dict]:
            """Return weights, number of photographs and this client's number."""
            model = NETWORKS[network]()
            load_arrays(model, parameters)
            optimiser = torch.optim.SGD(model.parameters(), lr=lr)
            F.cross_entropy(model(images), labels).backward()
            optimiser.step()
            return arrays_of(model), len(images), {"client": client}

    flwr.client.start_client(
        server_address=address, client=Client().to_client(), insecure=True, max_wait_time=60
    )


def run_server(address: str, network: str, folder: Path) -> None:
    """Run one round of FedAvg that keeps what one client answers."""
    flwr = import_flower()
    model = initial(network)

    def keep(parameters: Any, name: str) -> None:
        load_arrays(model, flwr.common.parameters_to_ndarrays(parameters))
        torch.save(model.state_dict(), folder / name)

    class Curious(flwr.server.strategy.FedAvg):
        """FedAvg, honest but curious."""

        def aggregate_fit(self, server_round: int, results: Any, failures: Any) -> Any:
            """Average as FedAvg does, and write one answer down."""
            for _, answer in results:
                if answer.metrics["client"] == WATCHED:
                    keep(answer.parameters, "after.pt")
                    print(
                        f"round {server_round}: {len(results)} answers are averaged, and client "
                        f"{WATCHED}'s is kept; it says that it has {answer.num_examples} sample"
                    )
            return super().aggregate_fit(server_round, results, failures)

    sent = flwr.common.ndarrays_to_parameters(arrays_of(model))
    keep(sent, "before.pt")
    strategy = Curious(
        fraction_evaluate=0.0,
        min_fit_clients=CLIENTS,
        min_available_clients=CLIENTS,
        initial_parameters=sent,
    )
    flwr.server.start_server(
        server_address=address,
        config=flwr.server.ServerConfig(num_rounds=1, round_timeout=120.0),
        strategy=strategy,
    )


def free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", choices=NETWORKS, default="mlp")
    parser.add_argument("--lr", type=float, default=0.1, help="the clients' learning rate")
    parser.add_argument("--folder", type=Path, default=Path(), help="where the weights are kept")
    parser.add_argument("--client", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--address", default="", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.client is not None:
        run_client(given.client, given.address, given.network, given.lr)
        return
    print(f"{CLIENTS} clients of a {given.network}, one photograph and one step of SGD each")
    address = free_address()
    common = ["--network", given.network, "--lr", str(given.lr), "--address", address]
    clients = [
        subprocess.Popen([sys.executable, __file__, "--client", str(n), *common])
        for n in range(CLIENTS)
    ]
    try:
        run_server(address, given.network, given.folder)
        codes = [client.wait(timeout=60) for client in clients]
    finally:
        for client in clients:
            client.kill()
    if any(codes):
        sys.exit(f"clients ended with exit codes {codes}")
    print(f"the server wrote {given.folder / 'before.pt'} and {given.folder / 'after.pt'}")


if __name__ == "__main__":
    main()
