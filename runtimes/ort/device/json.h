// JSON as a value: reads a manifest, writes a report. Numbers are doubles, which hold token ids and file sizes exactly.
#ifndef QSPARSE_DEVICE_JSON_H_
#define QSPARSE_DEVICE_JSON_H_

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace qsparse_device {

class Json {
 public:
  enum class Kind { kNull, kBool, kNumber, kText, kList, kObject };
  using Member = std::pair<std::string, Json>;

  Json() = default;
  Json(bool value) : kind_(Kind::kBool), bool_(value) {}
  Json(double value) : kind_(Kind::kNumber), number_(value) {}
  Json(int64_t value) : Json(static_cast<double>(value)) {}
  Json(int value) : Json(static_cast<double>(value)) {}
  Json(std::string value) : kind_(Kind::kText), text_(std::move(value)) {}
  Json(const char* value) : Json(std::string(value)) {}
  Json(const std::vector<int64_t>& values);
  static Json list();
  static Json object();

  // The value of a text; throws std::runtime_error that says where it stops being JSON.
  static Json parse(const std::string& text);
  // Members of objects keep their order; NaN and infinity are written as null, which JSON has no other word for.
  std::string to_string() const;

  bool is_null() const { return kind_ == Kind::kNull; }
  // What each throws when the value is of another kind names `what`, for example "manifest.json: parity".
  double number(const std::string& what) const;
  const std::string& text(const std::string& what) const;
  const std::vector<Json>& items(const std::string& what) const;
  const std::vector<Member>& members(const std::string& what) const;
  std::vector<int64_t> integers(const std::string& what) const;
  bool boolean(const std::string& what) const;
  // The member called `key`, or null; throws when this is no object.
  const Json& at(const std::string& key, const std::string& what) const;

  void add(Json item) { items_.push_back(std::move(item)); }
  void set(const std::string& key, Json value) { members_.emplace_back(key, std::move(value)); }

 private:
  void write(std::string& out) const;
  void require(Kind kind, const char* expected, const std::string& what) const;

  Kind kind_ = Kind::kNull;
  bool bool_ = false;
  double number_ = 0;
  std::string text_;
  std::vector<Json> items_;
  std::vector<Member> members_;
};

}  // namespace qsparse_device

#endif  // QSPARSE_DEVICE_JSON_H_
