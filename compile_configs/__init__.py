"""Compile profiles: one TOML file per device, read, checked and matched with nothing but the standard library."""

from compile_configs.errors import ProfileError
from compile_configs.match import Matched, Rejected, match
from compile_configs.profile import DeviceProfile, builtin_names, builtin_profiles, load_profile, parse_profile

__all__ = [
    "DeviceProfile",
    "Matched",
    "ProfileError",
    "Rejected",
    "builtin_names",
    "builtin_profiles",
    "load_profile",
    "match",
    "parse_profile",
]
