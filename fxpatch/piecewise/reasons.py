"""Why a call did not take the fastest way, counted: nobody notices a fallback that nobody counts."""

from __future__ import annotations

from enum import StrEnum


class Reason(StrEnum):
    """Each step down the ladder (captured, compiled without graph, original function) has one of these."""

    NO_DEVICE_GRAPH = "the device captures no graphs"
    CAPTURE_FAILED = "this size could not be captured"
    BUDGET = "the device has no room for the graphs of this size"
    EMPTY = "n is 0, and in a padded call the model would see a row"
    OVER_LARGEST = "n is above the largest size"
    MOVED_INPUT = "a tensor that is used in place is at another address than when it was captured"
    PADDING = "padding changes the results, and n is no captured size"
    RANKS_DISAGREE = "another rank could not prepare this"
    NOT_TRACED = "the model could not be traced, split or compiled"
    NOT_A_SIZE = "inputs are used in place, and n is no captured size"
    RELEASED = "the graphs have been released"
    AUTOCAST = "it is under another autocast than prepare() was"
    SHARED_INPUTS = "the model writes to an input whose memory another input shares"
    CAPTURING = "the caller is capturing a graph itself"
    REPLAY_DIFFERS = "a replay gave other results than eager, and the compiled pieces did not"
    PIECES_DIFFER = "the compiled pieces gave other results than eager"
