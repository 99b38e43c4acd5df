// The part of lamoe._native that packing of text uses.
#include "bind_common.h"
#include "text/unit_encoder.h"

using namespace lamoe;

namespace {

class PyUnitEncoder {
 public:
  explicit PyUnitEncoder(size_t max_entries) : encoder_(max_entries) {}

  std::optional<nb::bytes> start(nb::bytes text) {
    text_ = text;  // the encoder keeps pointers into it
    return found(encoder_.start(data(text_), text_.size()));
  }

  std::optional<nb::bytes> supply(const nb::bytes& ids) {
    need(encoder_.is_waiting(), "no piece of the text is missing; call start() first");
    return found(encoder_.supply(data(ids), ids.size()));
  }

  nb::bytes ids() const {
    need(!encoder_.is_waiting(), "a piece of the text is missing; give its ids to supply()");
    return nb::bytes(encoder_.ids(), encoder_.id_bytes());
  }

  size_t num_units() const { return encoder_.num_units(); }
  size_t num_words() const { return encoder_.num_words(); }

  static const uint8_t* data(const nb::bytes& b) { return (const uint8_t*)b.data(); }

 private:
  static std::optional<nb::bytes> found(UnitEncoder::Piece piece) {
    if (!piece.data) return std::nullopt;
    return nb::bytes(piece.data, piece.size);
  }

  UnitEncoder encoder_;
  nb::bytes text_;
};

}  // namespace

void bind_text(nb::module_& m) {
  using nb::arg;
  m.def(
      "count_units",
      [](const nb::bytes& text) { return count_units(PyUnitEncoder::data(text), text.size()); },
      arg("text"), "Return the number of units (see UnitEncoder) in a text in UTF-8.");
  nb::class_<PyUnitEncoder>(m, "UnitEncoder",
                            "Encodes texts in UTF-8 with caches of the ids of units and words.\n\n"
                            "A unit is a blank and the characters up to the next white space, or "
                            "white space.")
      .def(nb::init<size_t>(), arg("max_entries"), "Each cache holds at most `max_entries`.")
      .def("start", &PyUnitEncoder::start, arg("text"),
           "Begin a text. Return the first piece that is in no cache, or None. It is a word if it\n"
           "is in ASCII, otherwise a unit.")
      .def("supply", &PyUnitEncoder::supply, arg("ids"),
           "Give the ids of the missing piece, as bytes. Return the next one, or None.")
      .def("ids", &PyUnitEncoder::ids, "Return the ids of the text, as the bytes of `supply`.")
      .def_prop_ro("num_units", &PyUnitEncoder::num_units, "Units in the cache.")
      .def_prop_ro("num_words", &PyUnitEncoder::num_words, "Words in the cache.");
}
