"""The networks and building blocks in PyTorch, for the peers that are made for it."""

import measuring
import numpy as np
import torch
from measuring import HEADS, HIDDEN, UNITS, VOCABULARY, WIDTH
from torch import nn
from torch.nn import functional as F

torch.set_num_threads(2)


class Block(nn.Module):
    def __init__(self, inputs, width, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Identity()
        if stride > 1:
            conv = nn.Conv2d(inputs, width, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(width))

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


def resnet20():
    layers, inputs = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()], 16
    for width in (16, 32, 64):
        for block in range(3):
            layers.append(Block(inputs, width, 2 if block == 0 and width > 16 else 1))
            inputs = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


class BertTiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, dropout=0.0, batch_first=True)
            for _ in range(2)
        )
        self.classifier = nn.Linear(WIDTH, 10)

    def forward(self, tokens):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.classifier(x[:, 0])


def wide_mlp():
    layers = [part for _ in range(HIDDEN) for part in (nn.Linear(UNITS, UNITS), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(UNITS, 10))


NETWORKS = {"resnet20": resnet20, "bert_tiny": BertTiny, "wide_mlp": wide_mlp}


def batch(network):
    return tuple(map(torch.tensor, measuring.batch(network, image=(3, 32, 32))))


def sgd(model):
    return torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)


def step_of(model, optimizer, network, after=lambda: None):
    """A function that takes one training step."""
    x, y = batch(network)

    def step():
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        after()

    return step


def modules(shapes):
    """Layers that hold kernels of Keras' shapes, in PyTorch's order of axes."""
    layers = []
    for shape in shapes:
        if len(shape) == 2:
            layers.append(nn.Linear(*shape, bias=False))
        else:
            layers.append(nn.Conv2d(*shape[2:], shape[:2], bias=False))
    return nn.Sequential(*layers)


class Trained:
    """A small network in training, for what a crash loses; batches depend on the step only."""

    def __init__(self, make_sparse):
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Linear(64, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 10)
        )
        self.optimizer = sgd(self.model)
        self.state = make_sparse(self.model, self.optimizer)
        self.steps = 0

    def train(self, until, after):
        while self.steps < until:
            rng = np.random.default_rng(self.steps)
            x = torch.tensor(rng.normal(size=(32, 64)).astype("float32"))
            y = torch.tensor(rng.integers(0, 10, 32))
            self.optimizer.zero_grad()
            F.cross_entropy(self.model(x), y).backward()
            self.optimizer.step()
            self.steps += 1
            after(self)

    def weights(self):
        layers = (self.model[0], self.model[3])
        return [layer.weight.detach().numpy().copy() for layer in layers]


def crashed(make_sparse, after, state_of, restore):
    """Weights of an undisturbed training, and of one that is saved, made anew and loaded."""
    whole = Trained(make_sparse)
    whole.train(measuring.CRASH["steps"], after)
    first = Trained(make_sparse)
    first.train(measuring.CRASH["killed_at"], after)
    saved = state_of(first)
    torch.manual_seed(1)
    second = Trained(make_sparse)
    restore(second, saved)
    second.steps = measuring.CRASH["killed_at"]
    second.train(measuring.CRASH["steps"], after)
    return whole.weights(), second.weights()


class Custom(nn.Module):
    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(16, 16))

    def forward(self, x):
        return x @ self.kernel


class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.ModuleDict({"a": nn.Sequential(nn.Linear(16, 16))})

    def forward(self, x):
        return self.inner["a"](x)


def blocks():
    """Building block → module with one kind of kernel."""
    return {
        "dense": nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)),
        "convolution 1D": nn.Sequential(nn.Conv1d(8, 8, 3), nn.Conv1d(8, 8, 3)),
        "convolution 2D": nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)),
        "convolution 3D": nn.Sequential(nn.Conv3d(4, 4, 3), nn.Conv3d(4, 4, 3)),
        "transposed convolution": nn.Sequential(
            nn.ConvTranspose2d(8, 8, 3), nn.ConvTranspose2d(8, 8, 3)
        ),
        "LSTM": nn.Sequential(nn.LSTM(16, 16)),
        "GRU": nn.Sequential(nn.GRU(16, 16)),
        "attention": nn.Sequential(nn.MultiheadAttention(16, 2)),
        "kernel of an own layer": nn.Sequential(Custom()),
        "layers inside of layers": Deep(),
    }


def kernels_of(module):
    """All weights that multiply: parameters of rank ≥ 2."""
    return {name: p for name, p in module.named_parameters() if p.ndim >= 2}


INPUTS = {
    "dense": (4, 16), "convolution 1D": (2, 8, 9), "convolution 2D": (2, 8, 9, 9),
    "convolution 3D": (2, 4, 7, 7, 7), "transposed convolution": (2, 8, 9, 9), "LSTM": (4, 2, 16),
    "GRU": (4, 2, 16), "kernel of an own layer": (4, 16), "layers inside of layers": (4, 16),
}  # fmt: skip


def reaches_output(name, module, masks):
    """Whether the masks change what the module computes: 0 in all of them must be seen."""

    def output():
        if name == "attention":
            x = torch.ones(4, 2, 16)
            result = module[-1](x, x, x)
        else:
            result = module(torch.ones(INPUTS[name]))
        return (result[0] if isinstance(result, tuple) else result).detach().clone()

    module.train()
    before = output()
    with torch.no_grad():
        for mask in masks:
            mask.zero_()
    return not torch.equal(before, output())
