"""Differential privacy: the arithmetic of private training, without Trainers."""
