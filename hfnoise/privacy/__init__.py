"""Differentially private fine-tuning: accounting, calibration and the privacy ledger."""
