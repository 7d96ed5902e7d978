"""Fits the polynomials of csrc/cpu/elementary.h: python -m tools.elementary

Each is fitted at Chebyshev points, weighted so that the function's relative error is what is
least, reweighted until its peaks are level (Lawson's algorithm), and rounded to float32. Prints
coefficients, highest power first, and the greatest relative error in units of 2^-24.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Function = Callable[[np.ndarray], np.ndarray]


def fit(target: Function, weight: Function, degree: int, start: float, end: float) -> np.ndarray:
    """Coefficients, lowest power first, of the polynomial with the least weighted error."""
    points = np.cos(np.linspace(0, np.pi, 4001))
    x = (start + end) / 2 + (end - start) / 2 * points
    wanted, scale = target(x), weight(x)
    powers = np.vander(x, degree + 1, increasing=True)
    share = np.full_like(x, 1 / len(x))
    best, least = np.zeros(degree + 1), np.inf
    for _ in range(2000):
        root = np.sqrt(share) * scale
        found = np.linalg.lstsq(powers * root[:, None], wanted * root, rcond=None)[0]
        error = np.abs(scale * (powers @ found - wanted))
        if error.max() < least:
            best, least = found, error.max()
        share *= error
        share /= share.sum()
    return best


def exponential() -> tuple[np.ndarray, float]:
    """P of e^r = 1 + r + r²·P(r)."""
    end = 0.3466  # ln 2 / 2, and what the rounding of n adds
    terms = [1 / 2]
    for k in range(3, 20):
        terms.append(terms[-1] / k)
    series = np.polynomial.Polynomial(terms)
    found = fit(series, lambda r: r**2 / np.exp(r), 4, -end, end).astype(np.float32)
    r = np.linspace(-end, end, 100_001)
    value = 1 + r + r**2 * np.polynomial.Polynomial(found.astype(float))(r)
    return found, float(np.abs(value / np.exp(r) - 1).max())


def tangent() -> tuple[np.ndarray, float]:
    """Q of tanh(x) = x + x³·Q(x²)."""
    end = 0.625**2

    def target(s: np.ndarray) -> np.ndarray:
        s = np.maximum(s, 1e-3)  # below, tanh(x) − x cancels: the series stands for it
        x = np.sqrt(s)
        return (np.tanh(x) - x) / (s * x)

    def smooth(s: np.ndarray) -> np.ndarray:
        series = -1 / 3 + s * (2 / 15 + s * (-17 / 315 + s * 62 / 2835))
        return np.where(s < 4e-3, series, target(s))

    def weight(s: np.ndarray) -> np.ndarray:
        x = np.sqrt(np.maximum(s, 1e-12))
        return s * x / np.tanh(x)

    found = fit(smooth, weight, 4, 0.0, end).astype(np.float32)
    x = np.linspace(1e-3, 0.625, 100_001)
    value = x + x**3 * np.polynomial.Polynomial(found.astype(float))(x**2)
    return found, float(np.abs(value / np.tanh(x) - 1).max())


if __name__ == "__main__":
    for name, make in (("exp: P", exponential), ("tanh: Q", tangent)):
        coefficients, error = make()
        print(f"{name}, relative error {error * 2**24:.3f} · 2^-24")
        for coefficient in coefficients[::-1]:
            print(f"    {float(coefficient):.9g}")
