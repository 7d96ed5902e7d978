// mirror_step: one step of mirror descent for quantization (Ajanthan et al., AISTATS 2021), for
// every parameter of a list, in place.
//
// Of each weight w = α·x a value is stored, one number or one for each level λ. A step takes the
// gradient g = α·∂L/∂w, makes a direction d of it, moves the value along d and writes the weight
// that it projects to. Elements do not meet, so nothing depends on how a list is cut.
//
// direction   gradient  d = g
//             momentum  m ← decay·m + g,  d = m
//             adam      m ← decay·m + (1 − decay)·g,  v ← decay2·v + (1 − decay2)·g²,
//                       d = m / (√v + eps); rate holds the corrections of the bias
// projection  identity  the parameter itself is stored; weight_decay·w is added to its gradient
//             tanh      x = tanh(βv); of three levels ½[tanh(β(v + ½)) + tanh(β(v − ½))]
//             softmax   u = softmax(βv) over the levels, x = Σ λ u_λ
//             sign      x = sign(v); of three levels 0 where |v| ≤ ½
// update      dual      v ← v − rate·d; softmax v_λ ← v_λ − rate·λ·d; sign clips to [−1, 1]
//             jacobian  the same with d made of g·∂x/∂v, or of each g·∂x/∂v_λ
//             mirror    what is stored is x or u itself:
//                       tanh     e = (1 + x)/(1 − x) · exp(−2β·rate·d),  x ← (e − 1)/(e + 1)
//                       softmax  u_λ ← u_λ exp(−β·rate·λ·d) / Σ
// `rounded` writes the nearest level instead of x; for a softmax, that of the greatest u_λ.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/host_device.h"
#include "common/item_list.h"

namespace tk {

// In the order of the names in taylor_kernels/layout.py.
enum class Projection : int32_t { identity, tanh, softmax, sign };
enum class Update : int32_t { dual, jacobian, mirror };
enum class Direction : int32_t { gradient, momentum, adam };

// What a step does, as a type T that a kernel computes in needs it.
template <class T>
struct MirrorNumbers {
  T rate, decay, decay2, eps, beta, next_beta, scale, weight_decay;
};

struct MirrorItem {
  void* param;       // [elements]
  const void* grad;  // [elements]; null: the value stays, and is projected
  void* value;       // [1 or levels, elements]; null for the identity
  void* first;       // [1, or levels where each has its direction, elements]; null if not wanted
  void* second;
  int64_t elements;
  DType dtype;  // of param and grad; the others are float32, or float64 for f64
  int64_t projection;
  int64_t levels;  // 2: −1 and 1; 3: −1, 0 and 1
  int64_t update;
  int64_t direction;
  bool rounded;
  double rate, decay, decay2, eps, beta, next_beta, scale, weight_decay;

  template <class T>
  MirrorNumbers<T> numbers() const {
    return {static_cast<T>(rate),  static_cast<T>(decay),       static_cast<T>(decay2),
            static_cast<T>(eps),   static_cast<T>(beta),        static_cast<T>(next_beta),
            static_cast<T>(scale), static_cast<T>(weight_decay)};
  }
};

using MirrorList = ItemList<MirrorItem>;

// A parameter's own combination of the choices above, for kernels to be compiled for.
template <Projection projection, Update update, int levels>
struct MirrorRule {
  static constexpr Projection kProjection = projection;
  static constexpr Update kUpdate = update;
  static constexpr int kLevels = levels;
  static constexpr bool kSoftmax = projection == Projection::softmax;
  static constexpr int kPlanes = projection == Projection::identity ? 0 : kSoftmax ? levels : 1;
  static constexpr int kMomentPlanes = kSoftmax && update == Update::jacobian ? levels : 1;
  static constexpr int kStored = kPlanes > 0 ? kPlanes : 1;
};

// Calls use(MirrorRule<...>()) for what the codes say; Python has checked that there is such a
// rule.
template <class Use>
void with_mirror_rule(int64_t projection, int64_t update, int64_t levels, const Use& use) {
  using P = Projection;
  using U = Update;
  const bool two = levels == 2;
  const auto dual = [&](auto p) {
    constexpr P kP = decltype(p)::kProjection;
    return two ? use(MirrorRule<kP, U::dual, 2>()) : use(MirrorRule<kP, U::dual, 3>());
  };
  switch (static_cast<P>(projection)) {
    case P::identity:
      return use(MirrorRule<P::identity, U::dual, 2>());
    case P::sign:
      return dual(MirrorRule<P::sign, U::dual, 2>());
    case P::tanh:
      if (static_cast<U>(update) == U::dual) return dual(MirrorRule<P::tanh, U::dual, 2>());
      if (static_cast<U>(update) == U::mirror) return use(MirrorRule<P::tanh, U::mirror, 2>());
      return two ? use(MirrorRule<P::tanh, U::jacobian, 2>())
                 : use(MirrorRule<P::tanh, U::jacobian, 3>());
    default:
      if (static_cast<U>(update) == U::dual) return dual(MirrorRule<P::softmax, U::dual, 2>());
      if (static_cast<U>(update) == U::mirror)
        return two ? use(MirrorRule<P::softmax, U::mirror, 2>())
                   : use(MirrorRule<P::softmax, U::mirror, 3>());
      return two ? use(MirrorRule<P::softmax, U::jacobian, 2>())
                 : use(MirrorRule<P::softmax, U::jacobian, 3>());
  }
}

// The arithmetic of an element, or of a vector of them: M::V is their type, and M says what exp,
// tanh, sqrt, a fused product and a choice between two of them are.
template <class M, class Rule>
struct MirrorMath {
  using V = typename M::V;
  using Numbers = MirrorNumbers<V>;
  static constexpr int kPlanes = Rule::kStored;

  // The stored values of an element, and what they project to.
  struct Projected {
    V u[kPlanes < 2 ? 2 : kPlanes];  // softmax: the levels' weights; ternary tanh: its two steps
    V x;
  };

  TK_HOST_DEVICE static Projected project(const V (&v)[kPlanes], V beta) {
    Projected p = {};
    if constexpr (Rule::kProjection == Projection::identity) {
      p.x = v[0];
    } else if constexpr (Rule::kUpdate == Update::mirror) {
      for (int i = 0; i < kPlanes; ++i) p.u[i] = v[i];
      p.x = Rule::kSoftmax ? v[kPlanes - 1] - v[0] : v[0];
    } else if constexpr (Rule::kSoftmax) {
      V most = v[0];
      for (int i = 1; i < kPlanes; ++i) most = M::choose(v[i] > most, v[i], most);
      V sum = M::splat(0);
      for (int i = 0; i < kPlanes; ++i) sum = sum + (p.u[i] = M::exp(beta * (v[i] - most)));
      for (int i = 0; i < kPlanes; ++i) p.u[i] = p.u[i] / sum;
      p.x = p.u[kPlanes - 1] - p.u[0];
    } else if constexpr (Rule::kProjection == Projection::sign) {
      p.x = nearest(v[0]);
    } else if constexpr (Rule::kLevels == 2) {
      p.x = M::tanh(beta * v[0]);
    } else {
      p.u[0] = M::tanh(beta * (v[0] + M::splat(0.5)));
      p.u[1] = M::tanh(beta * (v[0] - M::splat(0.5)));
      p.x = M::splat(0.5) * (p.u[0] + p.u[1]);
    }
    return p;
  }

  TK_HOST_DEVICE static V rounded(const Projected& p) {
    const V zero = M::splat(0), one = M::splat(1);
    if constexpr (!Rule::kSoftmax) {
      return nearest(p.x);
    } else if constexpr (Rule::kLevels == 2) {
      return M::choose(p.u[1] >= p.u[0], one, -one);
    } else {
      const V outer = M::choose(p.u[2] >= p.u[0], p.u[2], p.u[0]);
      return M::choose(p.u[1] >= outer, zero, M::choose(p.u[2] >= p.u[0], one, -one));
    }
  }

  // Of an element whose gradient by x is g; `direction` makes d of a gradient and of the moments of
  // a plane.
  template <class Direct>
  TK_HOST_DEVICE static void move(V (&v)[kPlanes], V g, const Numbers& n, const Direct& direction) {
    const V one = M::splat(1);
    if constexpr (Rule::kUpdate == Update::jacobian) {
      const Projected p = project(v, n.beta);
      for (int i = 0; i < kPlanes; ++i) {
        V slope;
        if constexpr (Rule::kSoftmax) {
          slope = n.beta * p.u[i] * (level(i) - p.x);
        } else if constexpr (Rule::kLevels == 2) {
          slope = n.beta * ((one - p.x) * (one + p.x));
        } else {
          const V first = (one - p.u[0]) * (one + p.u[0]), second = (one - p.u[1]) * (one + p.u[1]);
          slope = n.beta * (M::splat(0.5) * (first + second));
        }
        v[i] = v[i] - n.rate * direction(g * slope, i);
      }
    } else if constexpr (Rule::kUpdate == Update::dual) {
      if constexpr (Rule::kProjection == Projection::identity)
        g = M::multiply_add(n.weight_decay, v[0], g);
      const V moved = n.rate * direction(g, 0);
      if constexpr (Rule::kSoftmax) {
        v[0] = v[0] + moved;
        v[kPlanes - 1] = v[kPlanes - 1] - moved;
      } else {
        v[0] = v[0] - moved;
      }
      if constexpr (Rule::kProjection == Projection::sign) {
        v[0] = M::choose(v[0] > one, one, v[0]);
        v[0] = M::choose(v[0] < -one, -one, v[0]);
      }
    } else if constexpr (Rule::kSoftmax) {
      // Exponents of levels that have no weight left do not count for the greatest.
      const V none = M::splat(-1e38), bound = M::splat(1e30);
      V turn = n.beta * n.rate * direction(g, 0);
      turn = M::choose(turn > bound, bound, M::choose(turn < -bound, -bound, turn));
      V exponent[kPlanes], most = none, sum = M::splat(0);
      for (int i = 0; i < kPlanes; ++i) {
        exponent[i] = M::choose(v[i] > M::splat(0), -level(i) * turn, none);
        most = M::choose(exponent[i] > most, exponent[i], most);
      }
      for (int i = 0; i < kPlanes; ++i) sum = sum + (v[i] = v[i] * M::exp(exponent[i] - most));
      for (int i = 0; i < kPlanes; ++i) v[i] = v[i] / sum;
    } else {
      // The guards only count where x is −1 or 1 exactly, which no later step leaves.
      const V guard = M::splat(1e-20), most = M::splat(1e30);
      const V ratio = (one + v[0] + guard) / (one - v[0] + guard);
      V e = ratio * M::exp(M::splat(-2) * n.beta * n.rate * direction(g, 0));
      e = M::choose(e < most, e, most);
      v[0] = (e - one) / (e + one);
    }
  }

 private:
  TK_HOST_DEVICE static V level(int plane) { return M::splat(2.0 * plane / (kPlanes - 1) - 1); }

  TK_HOST_DEVICE static V nearest(V x) {
    const V zero = M::splat(0), one = M::splat(1), half = M::splat(0.5);
    if constexpr (Rule::kLevels == 2) return M::choose(x >= zero, one, -one);
    return M::choose(x > half, one, M::choose(x < -half, -one, zero));
  }
};

}  // namespace tk
