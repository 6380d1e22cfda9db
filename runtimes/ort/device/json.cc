#include "json.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>

namespace qsparse_device {
namespace {

constexpr int kDeepest = 64;

class Parser {
 public:
  explicit Parser(const std::string& text) : text_(text) {}

  Json whole() {
    Json value = any(0);
    skip_space();
    if (at_ != text_.size()) fail("text after the value");
    return value;
  }

 private:
  [[noreturn]] void fail(const std::string& reason) const {
    throw std::runtime_error("not JSON at byte " + std::to_string(at_) + ": " + reason);
  }

  char peek() const { return at_ < text_.size() ? text_[at_] : '\0'; }

  void skip_space() {
    while (at_ < text_.size() && std::string(" \t\r\n").find(text_[at_]) != std::string::npos) ++at_;
  }

  bool take(const char* word) {
    const std::string wanted(word);
    if (text_.compare(at_, wanted.size(), wanted) != 0) return false;
    at_ += wanted.size();
    return true;
  }

  void expect(const char* word) {
    if (!take(word)) fail(std::string("expected ") + word);
  }

  Json any(int depth) {
    if (depth > kDeepest) fail("nested more than 64 deep");
    skip_space();
    switch (peek()) {
      case '{':
        return object(depth);
      case '[':
        return list(depth);
      case '"':
        return Json(string());
      case 't':
        expect("true");
        return Json(true);
      case 'f':
        expect("false");
        return Json(false);
      case 'n':
        expect("null");
        return Json();
      default:
        return number();
    }
  }

  Json object(int depth) {
    Json made = Json::object();
    expect("{");
    skip_space();
    if (take("}")) return made;
    do {
      skip_space();
      std::string key = string();
      skip_space();
      expect(":");
      made.set(key, any(depth + 1));
      skip_space();
    } while (take(","));
    expect("}");
    return made;
  }

  Json list(int depth) {
    Json made = Json::list();
    expect("[");
    skip_space();
    if (take("]")) return made;
    do {
      made.add(any(depth + 1));
      skip_space();
    } while (take(","));
    expect("]");
    return made;
  }

  Json number() {
    const char* start = text_.c_str() + at_;
    char* end = nullptr;
    const double value = strtod(start, &end);
    const bool begins_well = *start == '-' || (*start >= '0' && *start <= '9');
    if (end == start || !begins_well) fail("expected a value");
    at_ += static_cast<size_t>(end - start);
    return Json(value);
  }

  std::string string() {
    expect("\"");
    std::string out;
    while (peek() != '"') {
      if (at_ >= text_.size() || static_cast<unsigned char>(peek()) < 0x20) fail("a text that does not end");
      if (peek() != '\\') {
        out += text_[at_++];
        continue;
      }
      ++at_;
      const char escaped = peek();
      ++at_;
      switch (escaped) {
        case 'b':
          out += '\b';
          break;
        case 'f':
          out += '\f';
          break;
        case 'n':
          out += '\n';
          break;
        case 'r':
          out += '\r';
          break;
        case 't':
          out += '\t';
          break;
        case 'u':
          append_utf8(out, code_unit());
          break;
        case '"':
        case '\\':
        case '/':
          out += escaped;
          break;
        default:
          fail("an unknown escape");
      }
    }
    ++at_;
    return out;
  }

  uint32_t code_unit() {
    uint32_t value = 0;
    for (int i = 0; i < 4; ++i) {
      const char digit = peek();
      const int part = digit >= '0' && digit <= '9'   ? digit - '0'
                       : digit >= 'a' && digit <= 'f' ? digit - 'a' + 10
                       : digit >= 'A' && digit <= 'F' ? digit - 'A' + 10
                                                      : -1;
      if (part < 0) fail("expected four hexadecimal digits");
      value = value * 16 + static_cast<uint32_t>(part);
      ++at_;
    }
    return value;
  }

  void append_utf8(std::string& out, uint32_t unit) {
    if (unit >= 0xD800 && unit < 0xDC00 && take("\\u")) {  // the first half of a character beyond 16 bits
      unit = 0x10000 + ((unit - 0xD800) << 10) + (code_unit() & 0x3FF);
    }
    if (unit < 0x80) {
      out += static_cast<char>(unit);
    } else if (unit < 0x800) {
      out += static_cast<char>(0xC0 | unit >> 6);
      out += static_cast<char>(0x80 | (unit & 0x3F));
    } else if (unit < 0x10000) {
      out += static_cast<char>(0xE0 | unit >> 12);
      out += static_cast<char>(0x80 | (unit >> 6 & 0x3F));
      out += static_cast<char>(0x80 | (unit & 0x3F));
    } else {
      out += static_cast<char>(0xF0 | unit >> 18);
      out += static_cast<char>(0x80 | (unit >> 12 & 0x3F));
      out += static_cast<char>(0x80 | (unit >> 6 & 0x3F));
      out += static_cast<char>(0x80 | (unit & 0x3F));
    }
  }

  const std::string& text_;
  size_t at_ = 0;
};

void write_text(const std::string& text, std::string& out) {
  out += '"';
  for (const char c : text) {
    if (c == '"' || c == '\\') {
      out += '\\';
      out += c;
    } else if (static_cast<unsigned char>(c) < 0x20) {
      char escaped[8];
      snprintf(escaped, sizeof escaped, "\\u%04x", static_cast<unsigned>(c));
      out += escaped;
    } else {
      out += c;
    }
  }
  out += '"';
}

}  // namespace

Json::Json(const std::vector<int64_t>& values) : kind_(Kind::kList) {
  for (const int64_t value : values) items_.emplace_back(value);
}

Json Json::list() {
  Json made;
  made.kind_ = Kind::kList;
  return made;
}

Json Json::object() {
  Json made;
  made.kind_ = Kind::kObject;
  return made;
}

Json Json::parse(const std::string& text) { return Parser(text).whole(); }

std::string Json::to_string() const {
  std::string out;
  write(out);
  return out;
}

void Json::write(std::string& out) const {
  switch (kind_) {
    case Kind::kNull:
      out += "null";
      return;
    case Kind::kBool:
      out += bool_ ? "true" : "false";
      return;
    case Kind::kNumber: {
      char digits[32];
      const bool whole = std::nearbyint(number_) == number_ && std::fabs(number_) < 9007199254740992.0;
      snprintf(digits, sizeof digits, whole ? "%.0f" : "%.9g", number_);
      out += std::isfinite(number_) ? digits : "null";
      return;
    }
    case Kind::kText:
      write_text(text_, out);
      return;
    case Kind::kList:
      out += '[';
      for (size_t i = 0; i < items_.size(); ++i) {
        out += i ? ", " : "";
        items_[i].write(out);
      }
      out += ']';
      return;
    case Kind::kObject:
      out += '{';
      for (size_t i = 0; i < members_.size(); ++i) {
        out += i ? ", " : "";
        write_text(members_[i].first, out);
        out += ": ";
        members_[i].second.write(out);
      }
      out += '}';
      return;
  }
}

void Json::require(Kind kind, const char* expected, const std::string& what) const {
  if (kind_ != kind) throw std::runtime_error(what + " is " + to_string().substr(0, 60) + "; expected " + expected);
}

double Json::number(const std::string& what) const {
  require(Kind::kNumber, "a number", what);
  return number_;
}

bool Json::boolean(const std::string& what) const {
  require(Kind::kBool, "true or false", what);
  return bool_;
}

const std::string& Json::text(const std::string& what) const {
  require(Kind::kText, "a text", what);
  return text_;
}

const std::vector<Json>& Json::items(const std::string& what) const {
  require(Kind::kList, "a list", what);
  return items_;
}

const std::vector<Json::Member>& Json::members(const std::string& what) const {
  require(Kind::kObject, "an object", what);
  return members_;
}

std::vector<int64_t> Json::integers(const std::string& what) const {
  std::vector<int64_t> values;
  for (const Json& item : items(what)) values.push_back(static_cast<int64_t>(item.number(what)));
  return values;
}

const Json& Json::at(const std::string& key, const std::string& what) const {
  static const Json null;
  for (const Member& member : members(what)) {
    if (member.first == key) return member.second;
  }
  return null;
}

}  // namespace qsparse_device
