"""The distillation methods of the CIFAR-100 zoo, as RepDistiller, SSKD and the overhaul's authors train them.

A method is what it adds to a student beside its teacher: adapters of stock layers (nets/adapters.py) and losses (layers/), by the protocol
of zoo_protocol.py.  Taps and weights are RepDistiller's.
"""
from __future__ import annotations

from hintkd.experiment import Experiment
from hintkd.methods.method import Choice, Line, method
from hintkd.methods.stage import Stage
from hintkd.methods.zoo_crd import crd, crd_kd
from hintkd.methods.zoo_protocol import (
    SCHEDULES,
    Options,
    Schedule,
    distilled_stage,
    first_stage,
    label_stage,
    options,
    rate,
    schedule,
    weighed,
)
from hintkd.methods.zoo_sskd import sskd
from hintkd.nets import adapters, surgery
from hintkd.nets.basic_resnet import BasicResNet, DeepResNet
from hintkd.nets.distilled import Distilled, Feature
from hintkd.nets.wide_resnet import WideResNet

__all__ = ["SCHEDULES", "SOURCE", "Options", "Schedule", "crd", "crd_kd", "sskd"]
SOURCE = ("Tian, Krishnan, Isola 2020, Contrastive Representation Distillation, arXiv 1910.10699, and the methods that it compares with; "
          "Xu, Liu, Li, Loy 2020 (SSKD), arXiv 2006.07114; Heo et al. 2019 (overhaul), arXiv 1904.01866")


@method(needs_teacher=False, line=Line("#000000", ":"))
def original(x: Experiment) -> list[Stage]:
    """No teacher: plain softmax cross-entropy."""
    return [label_stage(x)]


# -- from scores ------------------------------------------------------------------------------------------------------------------
@method(line=Line("#E69F00"))
def kd(x: Experiment) -> list[Stage]:
    """Softened class scores: 0.1 CE + 0.9 tau^2 KL(p_t, p_s) (Hinton et al. 2015)."""
    return [distilled_stage(x, Distilled(x), "kd", gamma=0.1, alpha=0.9)]


# -- from maps --------------------------------------------------------------------------------------------------------------------
@method(line=Line("#0072B2"))
def fitnet(x: Experiment) -> list[Stage]:
    """A map in the middle, through a regressor r: CE + 100 mean (r(f_s) - f_t)^2 at the end of the second stage (Romero et al. 2015)."""
    d = Distilled(x)
    mine, other = d.student.stages[1], d.teacher.stages[1]
    fitted = adapters.rectified(d.losses, adapters.fitted(d.losses, "regressor", mine.blob, mine.shape, other.shape))
    if options(x).fitnet_stages == "one":
        d.distance("fitnet_loss", fitted, other, weighed(options(x).beta, 100))
        return [distilled_stage(x, d, "fitnet")]
    d.distance("fitnet_loss", fitted, other, weighed(options(x).beta, 1))
    hint = first_stage(x, d, "hint", rate(x), d.left_behind)
    return [hint, distilled_stage(x, Distilled(x), "kd", hint, gamma=0.1, alpha=0.9)]


@method(line=Line("#56B4E9"))
def at(x: Experiment) -> list[Stage]:
    """Attention maps A = mean_c f^2 / its norm: CE + 1000 sum over stages of mean (A_s - A_t)^2 (Zagoruyko, Komodakis 2017)."""
    d = Distilled(x)
    for i, student, teacher in d.pairs():
        mine, other = d.same_size(f"at{i}", student, teacher)
        d.loss(f"at{i}_loss", "attention", "AttentionLoss", [mine.blob, other.blob], weighed(options(x).beta, 1_000))
    return [distilled_stage(x, d, "at")]


@method(line=Line("#D55E00"))
def sp(x: Experiment) -> list[Stage]:
    """Similarities between images, N = rows of F F' of length 1: CE + 3000 |N_s - N_t|^2 / B^2 at the last stage (Tung, Mori 2019)."""
    d = Distilled(x)
    d.loss("sp_loss", "similarity", "SimilarityLoss", [d.student.stages[-1].blob, d.teacher.stages[-1].blob],
           weighed(options(x).beta, 3_000))
    return [distilled_stage(x, d, "sp")]


@method(line=Line("#CC79A7"))
def vid(x: Experiment) -> list[Stage]:
    """The teacher's maps, Gaussian about mu(f_s): CE + sum over stages of mean ((mu - f_t)^2 / v + log v) / 2 (Ahn et al. 2019)."""
    d = Distilled(x)
    for i, student, teacher in d.pairs():
        mine, other = d.same_size(f"vid{i}", student, teacher)
        mu = adapters.variational_regressor(d.losses, f"vid{i}_regressor", mine.blob, mine.shape[0], other.shape[0])
        d.loss(f"vid{i}_loss", "variational", "VariationalLoss", [mu, other.blob], weighed(options(x).beta, 1), blobs=1,
               learns=options(x).vid_variances == "learned")
    return [distilled_stage(x, d, "vid")]


@method(line=Line("#009E73"))
def ab(x: Experiment) -> list[Stage]:
    """On which side of 0 responses lie, first: 0.003 sum of 2^(l-L) (s -+ 1)^2 / B on the wrong side; then CE (Heo et al. 2019a)."""
    first = Distilled(x, preacts=True)
    pairs = list(first.pairs(preacts=True))
    for i, student, teacher in pairs:
        connected = adapters.connector(first.losses, f"connector{i}", student.blob, student.shape, teacher.shape)
        first.loss(f"ab{i}_loss", "boundary", "BoundaryLoss", [connected, teacher.blob],
                   weighed(options(x).beta, 1) * 0.003 / 2 ** (len(pairs) - 1 - i))
    first.hold_above()
    boundaries = first_stage(x, first, "boundaries", rate(x), first.left_behind, options(x).ab_statistics)
    last = Distilled(x, preacts=True)
    last.run_twice()
    return [boundaries, distilled_stage(x, last, "ab", boundaries)]


@method(line=Line("#009E73", "--"))
def ft(x: Experiment) -> list[Stage]:
    """Factors of maps, the teacher's by a paraphraser trained first: CE + 200 mean |A(z_s) - A(z_t)|, A as in AT (Kim et al. 2018)."""
    first = Distilled(x)
    maps = first.teacher.stages[-1]
    _, again = adapters.paraphraser(first.losses, maps.blob, maps.shape[0])
    first.distance("paraphraser_loss", again, maps, 1)
    lr = schedule(x).paraphraser_lr if isinstance(x.student, (BasicResNet, DeepResNet, WideResNet)) else rate(x)
    paraphraser = first_stage(x, first, "paraphraser", lr, (surgery.TEACHER,))

    d = Distilled(x)
    student, teacher = d.student.stages[-1], d.teacher.stages[-1]
    other = adapters.paraphraser_encoder(d.losses, teacher.blob, teacher.shape[0])
    surgery.freeze(d.losses.layer)
    mine = adapters.translator(d.losses, student.blob, student.shape[0], teacher.shape[0])
    width = teacher.shape[0] // 2
    factors = d.same_size("ft", Feature(mine, (width, *student.shape[1:])), Feature(other, (width, *teacher.shape[1:])))
    d.loss("ft_loss", "attention", "AttentionLoss", [factor.blob for factor in factors], weighed(options(x).beta, 200), norm=1)
    return [paraphraser, distilled_stage(x, d, "ft", paraphraser)]


@method(line=Line("#D55E00", "--"))
def oh(x: Experiment) -> list[Stage]:
    """Maps before ReLU, the teacher's behind a margin m: CE + sum of 2^(l-L) d(s, max(t, m)) / 1000 B, d partial (Heo et al. 2019b)."""
    d = Distilled(x, preacts=True)
    pairs = list(d.pairs(preacts=True))
    for i, student, teacher in pairs:
        connected = adapters.convolution(d.losses, f"connector{i}", student.blob, student.shape[0], teacher.shape[0], bias=False, he=True)
        adapters.normalised(d.losses, connected)
        mine, other = d.same_size(f"oh{i}", Feature(connected, (teacher.shape[0], *student.shape[1:])), teacher)
        d.loss(f"oh{i}_loss", "margin_relu", "MarginLoss", [mine.blob, other.blob],
               weighed(options(x).beta, 1) / (1_000 * 2 ** (len(pairs) - 1 - i)), shared=d.norm_of(teacher))
    if options(x).oh_statistics == "batch":                  # all of the teacher, whose stored statistics move as in the sources
        d.run([d.teacher.logits])
    return [distilled_stage(x, d, "oh", statistics=options(x).oh_statistics)]


# -- from the features behind the global pooling ------------------------------------------------------------------------------------
@method(line=Line("#56B4E9", "--"))
def rkd(x: Experiment) -> list[Stage]:
    """Distances and angles between images' features: CE + 25 L_d + 50 L_a, smooth L1 (Park et al. 2019)."""
    d = Distilled(x)
    d.loss("rkd_loss", "relation", "RelationalLoss", [d.student.pooled.blob, d.teacher.pooled.blob], weighed(options(x).beta, 1))
    return [distilled_stage(x, d, "rkd")]


@method(line=Line("#CC79A7", "--"))
def pkt(x: Experiment) -> list[Stage]:
    """Cosines between images as probabilities: CE + 30000 mean over pairs of p_t log(p_t / p_s) (Passalis, Tefas 2018)."""
    d = Distilled(x)
    d.loss("pkt_loss", "correlation", "ProbabilisticLoss", [d.student.pooled.blob, d.teacher.pooled.blob],
           weighed(options(x).beta, 30_000))
    return [distilled_stage(x, d, "pkt")]


# -- points with one answer ---------------------------------------------------------------------------------------------------------
CHOICES = (
    Choice("what is published", "CRD and its table: the last epoch; SSKD: the best teacher; OH: the median of five last epochs",
           "the last iteration, measured from the saved weights"),
    Choice("AB's weight in the second stage", "given, and multiplied with 0", "labels alone, and KD where alpha says so"),
    Choice("AB and wide ResNets", "BatchNorms whose tops are tapped run twice an iteration in both stages; the last one is not trained in "
           "the first", "so"),
    Choice("FT in its authors' code", "factors of length 1 over all of an image, no BatchNorm, an L1 reconstruction, beta 500",
           "RepDistiller's: attention maps of the factors, BatchNorm in the translator, squares, beta 200"),
    Choice("OH and maps of different sizes", "none in the pairs it was published for", "the larger one is averaged to the smaller"),
    Choice("OH's optimiser", "begins anew at each fall of the rate", "goes on"),
    Choice("seeds of first stages", "each run has its own", "each net has its own"),
)
