"""Every exception edgekit raises on purpose, drawn once. A class owns the exit code of the command it ends.

EdgekitError                     1   anything that is not one of these is a defect of ours
  UsageError                     2   the request cannot be meant
    IllegalSteps                     steps outside the bundle's few-step contract
    BadRequest                       any other option out of its range, or one the bundle cannot honour
    UnknownFamily                    no exporter for this kind of model
    UnsupportedModel                 a known family with a feature the exporter refuses by name
    BadSource                        a model folder that is incomplete or malformed
    BudgetTooSmall                   no choice of precisions keeps within the limits asked for
  GateFailed                     3   the result was made and is not good enough
    ParityFailed                     an exported part does not answer like its source
    PlanRefused                      a precision plan that breaks its budget, a cap, or is slower and worse
    KernelsMissing                   the engine did not fuse what a precision plan counts on
  DeviceError                    4   the machine cannot do it
    UnknownDevice                    no backend has this name
    DeviceMissing                    the backend is not installed, or gave another device than asked
    MissingPackage                   an optional dependency this work needs is not installed
    MemoryLimit                      the hard memory cap would be, or was, exceeded
    SessionFailed                    the inference engine refused a graph or a run
  BundleError                    5   the bundle is not what it says it is
    UnknownFormat                    written by another format version
    BadManifest                      edgekit.json is malformed, or contradicts itself or its graphs
    BadGraph                         a graph file that is not well-formed ONNX
    BadArchive                       a zip that is not one plain, stored bundle
    UnsafePath                       a path that leaves the bundle, or a link
    MissingFile, ExtraFile           the folder and the manifest disagree
    WrongSize, WrongHash             a file's bytes are not the declared ones
    UnfedInput                       a graph input that nothing feeds
    ForeignInput                     an input is not the one a graph was quantized with
    TableMismatch                    the shipped coefficient table is not the recipe's
  NetworkError                   6   the other side did not answer
"""


class EdgekitError(Exception):
    """Base of all: the message says what happened, where, and what to do next."""

    exit_code = 1


class UsageError(EdgekitError):
    """The request cannot be meant."""

    exit_code = 2


class IllegalSteps(UsageError):
    """A step count or strength outside the bundle's few-step contract."""


class BadRequest(UsageError):
    """An option out of its range, or one this bundle cannot honour."""


class UnknownFamily(UsageError):
    """No exporter knows this kind of model."""


class UnsupportedModel(UsageError):
    """A known family with a feature the exporter does not model: refused by name, never approximated."""


class BadSource(UsageError):
    """A model folder that is incomplete or malformed."""


class BudgetTooSmall(UsageError):
    """No choice of precisions keeps within the bytes, milliseconds and errors asked for."""


class GateFailed(EdgekitError):
    """The result was made and is not good enough."""

    exit_code = 3


class ParityFailed(GateFailed):
    """An exported part does not answer like its source."""


class PlanRefused(GateFailed):
    """A precision plan that breaks its budget or a cap, is slower and worse, or that one choice for all beats."""


class KernelsMissing(GateFailed):
    """The engine did not fuse what a precision plan counts on: it runs as floats between conversions."""


class DeviceError(EdgekitError):
    """The machine cannot do it."""

    exit_code = 4


class UnknownDevice(DeviceError):
    """No backend has this device name."""


class DeviceMissing(DeviceError):
    """The backend is not installed, or gave another device than the one asked for."""


class MissingPackage(DeviceError):
    """An optional dependency this work needs is not installed."""


class MemoryLimit(DeviceError):
    """The hard memory cap would be, or was, exceeded."""


class SessionFailed(DeviceError):
    """The inference engine refused a graph or a run."""


class BundleError(EdgekitError):
    """The bundle is not what it says it is."""

    exit_code = 5


class UnknownFormat(BundleError):
    """Written by a format version this edgekit does not read."""


class BadManifest(BundleError):
    """edgekit.json is malformed, or contradicts itself or its graphs."""


class BadGraph(BundleError):
    """A graph file that is not well-formed ONNX, or hides more than a bundle may hold."""


class BadArchive(BundleError):
    """A zip that is not one plain, uncompressed bundle."""


class UnsafePath(BundleError):
    """A path that leaves the bundle, or a link inside it."""


class MissingFile(BundleError):
    """A file the manifest names is not there."""


class ExtraFile(BundleError):
    """A file is there that the manifest does not name."""


class WrongSize(BundleError):
    """A file has another size than declared, or a size nobody can mean."""


class WrongHash(BundleError):
    """A file's bytes are not the declared ones."""


class UnfedInput(BundleError):
    """A graph input that neither recipe nor decoding block feeds."""


class ForeignInput(BundleError):
    """A guard of a quantized graph found an input that its constants were not computed from."""


class TableMismatch(BundleError):
    """The shipped coefficient table is not what the recipe compiles to."""


class NetworkError(EdgekitError):
    """The other side did not answer."""

    exit_code = 6
