"""`sparsimony`: RigL and SET as PyTorch sparsifiers, masks as parametrizations."""

from importlib import metadata

import measuring
import torch
import torch_networks as networks
from measuring import DROP_FRACTION, SPARSITY, UPDATES
from sparsimony.distributions.base import UniformDistribution
from sparsimony.dst.rigl import RigL
from sparsimony.dst.set import SET
from sparsimony.schedulers.base import ConstantScheduler, CosineDecayScheduler
from sparsimony.utils import get_mask
from torch import nn

NEVER = 10**9


def config_of(model):
    return [
        {"tensor_fqn": f"{name}.weight"}
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
    ]


def sparsifier_of(model, optimizer, delta=NEVER, method=RigL, scheduler=CosineDecayScheduler):
    sparsifier = method(
        scheduler(DROP_FRACTION, NEVER, delta), UniformDistribution(), optimizer,
        sparsity=SPARSITY, init_method=None,
    )  # fmt: skip
    sparsifier.prepare(model, config_of(model))
    return sparsifier


def masks_of(sparsifier):
    return [get_mask(**config) for config in sparsifier.groups]


class Sparsimony(measuring.Peer):
    name = "sparsimony"
    reasons: dict = {}

    def versions(self):
        return {"sparsimony": metadata.version("sparsimony"), "torch": torch.__version__}

    def steps(self, network):
        dense, masked = (networks.NETWORKS[network]() for _ in range(2))
        optimizer = networks.sgd(masked)
        try:
            sparsifier = sparsifier_of(masked, optimizer)
            step = networks.step_of(masked, optimizer, network, after=sparsifier.step)
            step()
        except Exception as error:
            raise measuring.CannotRun(f"{type(error).__name__}: {error}") from error
        return {"dense": networks.step_of(dense, networks.sgd(dense), network), "sparse": step}

    def update(self, shapes):
        model = networks.modules(shapes)
        sparsifier = sparsifier_of(model, networks.sgd(model), 1, RigL, ConstantScheduler)

        def update():
            for config in sparsifier.groups:
                parametrization = config["module"].parametrizations.weight[0]
                parametrization.dense_grad = gradients[config["tensor_fqn"]]
            sparsifier.step()

        gradients = {
            config["tensor_fqn"]: torch.randn_like(get_mask(**config))
            for config in sparsifier.groups
        }
        return update, "RigL: drop and grow"

    def counts(self):
        model = networks.resnet20()
        optimizer = networks.sgd(model)
        sparsifier = sparsifier_of(model, optimizer, delta=2)
        step = networks.step_of(model, optimizer, "resnet20", after=sparsifier.step)
        before = [int(mask.sum()) for mask in masks_of(sparsifier)]
        try:
            for _ in range(2 * UPDATES):
                step()
        except RuntimeError as error:
            raise measuring.CannotRun(f"an update fails: {error}") from error
        return before, [int(mask.sum()) for mask in masks_of(sparsifier)]

    def memory(self):
        model = networks.resnet20()
        sparsifier = sparsifier_of(model, networks.sgd(model))
        size = sum(mask.numel() for mask in masks_of(sparsifier))
        # The masked weight is made anew in every forward pass; these two stay.
        buffers = sum(
            buffer.nbytes for config in sparsifier.groups for buffer in config["module"].buffers()
        )
        return buffers / size

    def files(self, folder):
        dense, sparse = folder / "dense.pt", folder / "sparse.pt"
        model = networks.modules(measuring.ONE_KERNEL)
        torch.save(model.state_dict(), dense)
        sparsifier_of(model, networks.sgd(model)).squash_mask()
        torch.save(model.state_dict(), sparse)
        return dense, sparse, "after `squash_mask`: a dense file with zeros"

    def crash(self, folder):
        def restore(trained, saved):
            trained.model.load_state_dict(saved[0])
            trained.optimizer.load_state_dict(saved[1])
            trained.state.load_state_dict(saved[2])

        try:
            whole, resumed = networks.crashed(
                lambda model, optimizer: sparsifier_of(
                    model, optimizer, measuring.CRASH["update_every"]
                ),
                lambda trained: trained.state.step(),
                lambda trained: [
                    part.state_dict() for part in (trained.model, trained.optimizer, trained.state)
                ],
                restore,
            )
        except Exception as error:
            raise measuring.CannotRun(f"{type(error).__name__}: {error}") from error
        return whole, resumed, "its state dict holds no step count: the schedule begins anew"

    def kinds(self):
        found = {}
        for name, module in networks.blocks().items():
            kernels = networks.kernels_of(module)
            total = sum(p.numel() for p in kernels.values())
            try:
                sparsifier = RigL(
                    CosineDecayScheduler(DROP_FRACTION, NEVER, NEVER), UniformDistribution(),
                    networks.sgd(module), sparsity=SPARSITY, init_method=None,
                )  # fmt: skip
                sparsifier.prepare(module, [{"tensor_fqn": path} for path in kernels])
                found[name] = sum(mask.numel() for mask in masks_of(sparsifier)) / total
                if not networks.reaches_output(name, module, masks_of(sparsifier)):
                    found[name] = "masks that do not reach the output"
            except Exception as error:
                found[name] = f"{type(error).__name__}: {error}"
        return found

    def next_mask(self, method, weights, mask, gradient, num_update):
        model = nn.Sequential(nn.Linear(*weights.shape[::-1], bias=False))
        options = {"method": {"RigL": RigL, "SET": SET}[method], "scheduler": ConstantScheduler}
        try:
            sparsifier = sparsifier_of(model, networks.sgd(model), 1, **options)
            (config,) = sparsifier.groups
            get_mask(**config).data = torch.tensor(mask, dtype=torch.float32)
            parametrization = config["module"].parametrizations.weight
            parametrization.original.data = torch.tensor(weights)
            if method == "RigL":
                parametrization[0].dense_grad = torch.tensor(gradient)
            sparsifier.step()
        except Exception as error:
            raise measuring.CannotRun(f"{type(error).__name__}: {error}") from error
        return get_mask(**config).numpy() > 0


if __name__ == "__main__":
    measuring.main(Sparsimony())
