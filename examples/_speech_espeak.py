"""eSpeak NG through ctypes: text to samples in memory, in any of its accents and voice variants.

The library and its data come with the espeakng-loader wheel; without it the system's libespeak-ng is taken. The
functions and constants are those of speak_lib.h, eSpeak NG's public header.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import numpy as np

HOW_TO_GET_IT = "pip install espeakng-loader (or the system's package, for example apt install libespeak-ng1)"
SYSTEM_LIBRARIES = ("libespeak-ng.so.1", "libespeak-ng.so", "libespeak-ng.1.dylib")

AUDIO_OUTPUT_SYNCHRONOUS = 2
INITIALIZE_DONT_EXIT = 0x8000
POS_CHARACTER = 1
CHARS_UTF8 = 1
ESPEAK_RATE, ESPEAK_PITCH = 1, 3
Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


class Unavailable(Exception):
    """There is no eSpeak NG here, or it does not start; the text says how to get it."""


class Synthesiser:
    """The library, started. It has one state for the whole process: it is not for several threads.

    Attributes:
        rate: samples per second.
        name: version and where the library is from.
    """

    def __init__(self) -> None:
        self._library, data, origin = _load()
        declare(self._library)
        self.rate = self._library.espeak_Initialize(AUDIO_OUTPUT_SYNCHRONOUS, 0, data, INITIALIZE_DONT_EXIT)
        if self.rate <= 0:
            raise Unavailable(f"eSpeak NG from {origin} does not find its data: {HOW_TO_GET_IT}")
        folder = ctypes.c_char_p()
        self.name = f"eSpeak NG {self._library.espeak_Info(ctypes.byref(folder)).decode()} from {origin}"
        self._variants = Path(os.fsdecode(folder.value or b""), "voices", "!v")
        # breathy voices are noise: without a seed they differ from run to run (versions before 1.52 have none)
        if hasattr(self._library, "espeak_ng_SetRandSeed"):
            self._library.espeak_ng_SetRandSeed(ctypes.c_long(0))
        self._pieces: list[bytes] = []
        self._callback = Callback(self._take)  # kept alive: the library calls it

    def _take(self, samples: object, count: int, _events: object) -> int:
        if samples and count > 0:
            self._pieces.append(ctypes.string_at(samples, 2 * count))
        return 0

    def __call__(self, text: str, voice: str, speed: int, pitch: int) -> np.ndarray:
        """Speak.

        Args:
            text: what to say.
            voice: accent and variant, such as "en-us+f3".
            speed: words per minute, 80 to 450.
            pitch: 0 to 100; 50 is the voice's own.

        Returns:
            float32 samples [M] in -1..1.

        Raises:
            ValueError: if there is no such voice.
            RuntimeError: if the library says no.
        """
        variant = voice.partition("+")[2]  # one that does not exist is passed over by the library
        known = not variant or (self._variants / variant).is_file()
        if not known or self._library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise ValueError(
                f"Synthesiser: argument 'voice' must name an accent and a variant of eSpeak NG, got {voice!r}"
            )
        self._library.espeak_SetSynthCallback(self._callback)
        self._pieces.clear()
        encoded = text.encode()
        failed = (
            self._library.espeak_SetParameter(ESPEAK_RATE, speed, 0)
            or self._library.espeak_SetParameter(ESPEAK_PITCH, pitch, 0)
            or self._library.espeak_Synth(encoded, len(encoded) + 1, 0, POS_CHARACTER, 0, CHARS_UTF8, None, None)
        )
        if failed or not self._pieces:
            raise RuntimeError(f"eSpeak NG could not say {text!r} with {voice!r} (error {failed})")
        return np.frombuffer(b"".join(self._pieces), np.int16).astype(np.float32) / 32768


def _load() -> tuple[ctypes.CDLL, bytes | None, str]:
    """The library, the folder of its data (None: its own default), and where it is from."""
    reasons = []
    try:
        import espeakng_loader

        path = espeakng_loader.get_library_path()
        return ctypes.CDLL(path), espeakng_loader.get_data_path().encode(), "the espeakng-loader wheel"
    except (ImportError, OSError, RuntimeError) as failure:
        reasons.append(str(failure))
    for name in SYSTEM_LIBRARIES:
        try:
            return ctypes.CDLL(name), None, f"the system ({Path(name).name})"
        except OSError as failure:
            reasons.append(str(failure))
    raise Unavailable(f"eSpeak NG, which speaks the digits, is not here: {HOW_TO_GET_IT}\n  " + "\n  ".join(reasons))


def declare(library: ctypes.CDLL) -> None:
    """Argument and result types of the functions that are called."""
    c_int, c_char_p, c_void_p, c_uint = ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_uint
    library.espeak_Initialize.argtypes = [c_int, c_int, c_char_p, c_int]
    library.espeak_Info.argtypes, library.espeak_Info.restype = [ctypes.POINTER(c_char_p)], c_char_p
    library.espeak_SetSynthCallback.argtypes, library.espeak_SetSynthCallback.restype = [Callback], None
    library.espeak_SetVoiceByName.argtypes = [c_char_p]
    library.espeak_SetParameter.argtypes = [c_int, c_int, c_int]
    library.espeak_Synth.argtypes = [c_char_p, ctypes.c_size_t, c_uint, c_int, c_uint, c_uint, c_void_p, c_void_p]
