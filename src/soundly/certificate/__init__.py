"""Certificates: a file format for what was proved, and an independent checker. Nothing here imports torch."""

from soundly.certificate.check import CheckResult, ClaimResult, check
from soundly.certificate.format import Certificate, head_edit

__all__ = ["Certificate", "CheckResult", "ClaimResult", "check", "head_edit"]
