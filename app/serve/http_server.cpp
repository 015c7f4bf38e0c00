#include "app/serve/http_server.h"

#include <fmt/format.h>

#include <algorithm>
#include <boost/asio/co_spawn.hpp>
#include <boost/asio/detached.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/redirect_error.hpp>
#include <boost/asio/signal_set.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/thread_pool.hpp>
#include <boost/asio/use_awaitable.hpp>
#include <boost/beast/core.hpp>
#include <boost/beast/http.hpp>
#include <chrono>
#include <csignal>
#include <string_view>
#include <utility>

#include "llm/error.h"

namespace moba::app {
namespace {

namespace asio = boost::asio;
namespace beast = boost::beast;
namespace http = beast::http;
using asio::awaitable;
using asio::use_awaitable;
using asio::ip::tcp;
using boost::system::error_code;
using Stream = beast::tcp_stream;
using Parser = http::request_parser<http::string_body>;
using std::chrono::milliseconds;

constexpr std::uint32_t kMaxHeader = 16 << 10;
/// Comments keep proxies from closing a stream whose prompt is being read.
constexpr std::chrono::seconds kKeepAlive{15};
/// Bytes and time after an early response in which the rest of the request is dropped: closing at once could
/// take the response away from a client that still sends.
constexpr std::size_t kMaxDropped = std::size_t{1} << 28;
constexpr std::chrono::seconds kMaxDropTime{5};

std::chrono::nanoseconds duration_of(double seconds) {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::duration<double>(seconds));
}

/// Wakes a coroutine of the thread of `timer`.
struct Wake {
  explicit Wake(asio::io_context& context) : timer(context) {}
  asio::steady_timer timer;
  bool is_watching = true;
  bool is_client_gone = false;
};

/// Notes when the client closes its connection, until `wake->is_watching` ends.
void watch(tcp::socket& socket, const std::shared_ptr<Wake>& wake) {
  socket.async_wait(tcp::socket::wait_read, [&socket, wake](error_code error) {
    if (error || !wake->is_watching) return;
    char byte = 0;
    const std::size_t size = socket.receive(asio::buffer(&byte, 1), tcp::socket::message_peek, error);
    if (size > 0 || error == asio::error::would_block) return;  // the next request
    wake->is_client_gone = true;
    wake->timer.cancel();
  });
}

std::string field_of(const Parser& parser, http::field name) {
  const auto value = parser.get()[name];
  return {value.data(), value.size()};
}

HttpRequest head_of(const Parser& parser) {
  const auto method = parser.get().method_string();
  const auto target = parser.get().target();
  HttpRequest request;
  request.method.assign(method.data(), method.size());
  request.path.assign(target.data(), std::min(target.find('?'), target.size()));
  request.authorization = field_of(parser, http::field::authorization);
  request.host = field_of(parser, http::field::host);
  request.origin = field_of(parser, http::field::origin);
  return request;
}

/// Returns the error of a request that is not HTTP, or too large; nothing where the connection has ended.
std::optional<HttpError> error_of(const error_code& error, const HttpSettings& settings) {
  if (error == http::error::body_limit)
    return HttpError(413, fmt::format("body: expected at most {} bytes, got more", settings.max_body));
  if (error == http::error::header_limit || error == http::error::buffer_overflow)
    return HttpError(431, fmt::format("header: expected at most {} bytes, got more", kMaxHeader));
  if (error == http::error::end_of_stream || error == http::error::partial_message) return std::nullopt;
  if (error.category() == make_error_code(http::error::bad_method).category())
    return HttpError(400, fmt::format("request: expected HTTP/1.1, got {}", error.message()));
  return std::nullopt;
}

}  // namespace

class HttpServer::Impl {
 public:
  Impl(const HttpSettings& settings, HttpHandlers handlers);

  std::uint16_t port() const { return acceptor_.local_endpoint().port(); }
  void run();
  void stop();

 private:
  awaitable<void> accept();
  awaitable<void> connection(Stream stream);
  awaitable<bool> answer(Stream& stream, beast::flat_buffer& buffer);
  awaitable<HttpReply> handle(const HttpRequest& request);
  awaitable<void> send(Stream& stream, const HttpResponse& response, unsigned version, bool keep_alive);
  awaitable<bool> send(Stream& stream, PendingResponse& pending, unsigned version, bool keep_alive);
  awaitable<void> send_events(Stream& stream, std::string events, bool is_first, bool is_last,
                              unsigned version, bool keep_alive);
  awaitable<void> drop_rest(Stream& stream);
  awaitable<void> wait_for_signals();
  awaitable<void> finish();

  HttpSettings settings_;
  HttpHandlers handlers_;
  asio::io_context context_{1};
  tcp::acceptor acceptor_{context_};
  asio::signal_set signals_{context_};
  std::int64_t connections_ = 0;
  std::int64_t responses_ = 0;  // begun and not sent
  bool is_stopping_ = false, is_aborted_ = false;
  asio::thread_pool workers_{2};
};

HttpServer::Impl::Impl(const HttpSettings& settings, HttpHandlers handlers)
    : settings_(settings), handlers_(std::move(handlers)) {
  error_code error;
  const std::string host = settings.host == "localhost" ? "127.0.0.1" : settings.host;
  const auto address = asio::ip::make_address(host, error);
  if (error) throw llm::UsageError(fmt::format("--host: expected an IP address, got {}", settings.host));
  const tcp::endpoint endpoint(address, settings.port);
  const auto check = [&] {
    if (error) {
      throw llm::UsageError(fmt::format("--port: expected a free port, got {}:{}: {}", settings.host,
                                        settings.port, error.message()));
    }
  };
  acceptor_.open(endpoint.protocol(), error);
  check();
  acceptor_.set_option(asio::socket_base::reuse_address(true), error);
  acceptor_.bind(endpoint, error);
  check();
  acceptor_.listen(asio::socket_base::max_listen_connections, error);
  check();
  signals_.add(SIGINT);
  signals_.add(SIGTERM);
}

void HttpServer::Impl::run() {
  asio::co_spawn(context_, accept(), asio::detached);
  asio::co_spawn(context_, wait_for_signals(), asio::detached);
  context_.run();
}

void HttpServer::Impl::stop() {
  asio::post(context_, [this] {
    is_aborted_ = is_stopping_;  // the second time
    if (std::exchange(is_stopping_, true)) return;
    handlers_.begin_stop();
    asio::co_spawn(context_, finish(), asio::detached);
  });
}

awaitable<void> HttpServer::Impl::wait_for_signals() {
  while (true) {
    co_await signals_.async_wait(use_awaitable);
    stop();
  }
}

/// Waits for pending responses, then ends them, then the server.
awaitable<void> HttpServer::Impl::finish() {
  constexpr milliseconds kPoll{20};
  constexpr std::chrono::seconds kAbort{5};
  asio::steady_timer timer(context_);
  auto end = std::chrono::steady_clock::now() + duration_of(settings_.grace_seconds);
  while (responses_ > 0 && !is_aborted_ && std::chrono::steady_clock::now() < end) {
    timer.expires_after(kPoll);
    co_await timer.async_wait(use_awaitable);
  }
  handlers_.abort();
  end = std::chrono::steady_clock::now() + kAbort;
  while (responses_ > 0 && std::chrono::steady_clock::now() < end) {
    timer.expires_after(kPoll);
    co_await timer.async_wait(use_awaitable);
  }
  context_.stop();
}

awaitable<void> HttpServer::Impl::accept() {
  asio::steady_timer pause(context_);
  while (true) {
    error_code error;
    tcp::socket socket = co_await acceptor_.async_accept(asio::redirect_error(use_awaitable, error));
    if (!error) {
      asio::co_spawn(context_, connection(Stream(std::move(socket))), asio::detached);
      continue;
    }
    pause.expires_after(milliseconds(100));  // no file descriptors are left
    co_await pause.async_wait(use_awaitable);
  }
}

namespace {

struct Count {
  explicit Count(std::int64_t& counted) : value(counted) { ++value; }
  ~Count() { --value; }
  Count(const Count&) = delete;
  Count& operator=(const Count&) = delete;
  std::int64_t& value;
};

}  // namespace

awaitable<void> HttpServer::Impl::connection(Stream stream) {
  const Count count(connections_);
  try {
    stream.socket().set_option(tcp::no_delay(true));
    if (connections_ > settings_.max_connections) {
      const HttpError error(
          503, fmt::format("connections: expected at most {}, got one more", settings_.max_connections),
          {.fields = {{"Retry-After", "1"}}});
      co_await send(stream, error_response(error), 11, false);
    } else {
      beast::flat_buffer buffer(2 * kMaxHeader);
      while (co_await answer(stream, buffer)) {
      }
    }
    stream.socket().shutdown(tcp::socket::shutdown_send);
  } catch (const boost::system::system_error&) {
    // The connection is lost.
  }
}

/// Answers the next request of a connection. Returns whether another one may follow.
awaitable<bool> HttpServer::Impl::answer(Stream& stream, beast::flat_buffer& buffer) {
  Parser parser;
  parser.header_limit(kMaxHeader);
  parser.body_limit(settings_.max_body);
  stream.expires_after(duration_of(settings_.timeout_seconds));  // for header and body together
  error_code error;
  co_await http::async_read_header(stream, buffer, parser, asio::redirect_error(use_awaitable, error));
  std::optional<HttpError> wrong = error ? error_of(error, settings_) : std::nullopt;
  if (error && !wrong) co_return false;

  const Count responding(responses_);
  const unsigned version = parser.get().version();
  if (!wrong) {
    const HttpRequest head = head_of(parser);
    if (const std::optional<HttpResponse> refused = handlers_.check(head)) {
      const bool has_body = parser.get().method() != http::verb::head;  // of a response
      const bool keep_alive = parser.is_done() && parser.keep_alive() && has_body;
      co_await send(stream, *refused, version, keep_alive);
      if (!keep_alive) co_await drop_rest(stream);
      co_return keep_alive;
    }
    if (beast::iequals(parser.get()[http::field::expect], "100-continue")) {
      http::response<http::empty_body> proceed(http::status::continue_, version);
      co_await http::async_write(stream, proceed, use_awaitable);
    }
    co_await http::async_read(stream, buffer, parser, asio::redirect_error(use_awaitable, error));
    if (error) wrong = error_of(error, settings_);
    if (error && !wrong) co_return false;
  }
  if (wrong) {
    co_await send(stream, error_response(*wrong), 11, false);
    co_await drop_rest(stream);
    co_return false;
  }

  HttpRequest request = head_of(parser);
  request.body = std::move(parser.get().body());
  const bool keep_alive = parser.keep_alive();
  HttpReply reply = co_await asio::co_spawn(workers_, handle(request), use_awaitable);
  request.body = {};
  if (const auto* response = std::get_if<HttpResponse>(&reply)) {
    co_await send(stream, *response, version, keep_alive);
    co_return keep_alive;
  }
  co_return co_await send(stream, *std::get<1>(reply), version, keep_alive);
}

awaitable<HttpReply> HttpServer::Impl::handle(const HttpRequest& request) {
  HttpReply reply;
  try {
    reply = handlers_.handle(request);
  } catch (const HttpError& error) {
    reply = error_response(error);
  } catch (const std::exception& error) {
    reply = error_response(HttpError(500, error.what()));
  }
  co_return reply;
}

awaitable<void> HttpServer::Impl::send(Stream& stream, const HttpResponse& response, unsigned version,
                                       bool keep_alive) {
  http::response<http::string_body> message(http::int_to_status(response.status), version);
  message.body() = response.body;
  if (!response.body.empty()) message.set(http::field::content_type, response.content_type);
  for (const auto& [name, value] : response.fields) message.set(name, value);
  if (settings_.cors_origin) message.set(http::field::access_control_allow_origin, *settings_.cors_origin);
  message.keep_alive(keep_alive);
  message.prepare_payload();
  handlers_.count(response.status);
  stream.expires_after(duration_of(settings_.timeout_seconds));
  co_await http::async_write(stream, message, use_awaitable);
}

/// Sends a response as it is made. Returns whether another request may follow; false if the client has gone.
awaitable<bool> HttpServer::Impl::send(Stream& stream, PendingResponse& pending, unsigned version,
                                       bool keep_alive) {
  const auto wake = std::make_shared<Wake>(context_);
  struct EndOfWatch {
    Wake& wake;
    ~EndOfWatch() { wake.is_watching = false; }
  };
  const EndOfWatch end_of_watch{*wake};
  pending.on_ready([this, weak = std::weak_ptr(wake)] {
    asio::post(context_, [weak] {
      if (const auto waiting = weak.lock()) waiting->timer.cancel();
    });
  });
  stream.expires_never();
  watch(stream.socket(), wake);
  keep_alive = keep_alive && version >= 11;
  bool is_begun = false;
  while (true) {
    PendingResponse::Part part = pending.next();
    if (part.whole) {
      wake->is_watching = false;
      stream.socket().cancel();
      co_await send(stream, *part.whole, version, keep_alive);
      co_return keep_alive;
    }
    if (!part.events.empty() || part.is_last) {
      co_await send_events(stream, std::move(part.events), !is_begun, part.is_last, version, keep_alive);
      is_begun = true;
    }
    if (part.is_last) break;
    if (wake->is_client_gone) co_return false;
    wake->timer.expires_after(kKeepAlive);
    error_code woken;
    co_await wake->timer.async_wait(asio::redirect_error(use_awaitable, woken));
    if (!woken && is_begun) co_await send_events(stream, ":\n\n", false, false, version, keep_alive);
  }
  wake->is_watching = false;
  stream.socket().cancel();
  co_return keep_alive;
}

/// Sends a part of a stream: in chunks, or to a client of HTTP/1.0 up to the end of the connection.
awaitable<void> HttpServer::Impl::send_events(Stream& stream, std::string events, bool is_first, bool is_last,
                                              unsigned version, bool keep_alive) {
  stream.expires_after(duration_of(settings_.timeout_seconds));
  const bool is_chunked = version >= 11;
  if (is_first) {
    handlers_.count(200);
    http::response<http::empty_body> head(http::status::ok, version);
    head.set(http::field::content_type, "text/event-stream");
    head.set(http::field::cache_control, "no-cache");
    if (settings_.cors_origin) head.set(http::field::access_control_allow_origin, *settings_.cors_origin);
    head.keep_alive(keep_alive);
    head.chunked(is_chunked);
    http::response_serializer<http::empty_body> serializer(head);
    co_await http::async_write_header(stream, serializer, use_awaitable);
  }
  if (!events.empty() && is_chunked) {
    const auto chunk = http::make_chunk(asio::buffer(events));
    co_await asio::async_write(stream, chunk, use_awaitable);
  } else if (!events.empty()) {
    co_await asio::async_write(stream, asio::buffer(events), use_awaitable);
  }
  if (is_last && is_chunked) {
    const auto end = http::make_chunk_last();
    co_await asio::async_write(stream, end, use_awaitable);
  }
  stream.expires_never();
}

awaitable<void> HttpServer::Impl::drop_rest(Stream& stream) {
  std::vector<char> dropped(1 << 16);
  stream.socket().shutdown(tcp::socket::shutdown_send);
  stream.expires_after(kMaxDropTime);
  error_code error;
  for (std::size_t size = 0; !error && size < kMaxDropped;)
    size +=
        co_await stream.async_read_some(asio::buffer(dropped), asio::redirect_error(use_awaitable, error));
}

HttpServer::HttpServer(const HttpSettings& settings, HttpHandlers handlers)
    : impl_(std::make_unique<Impl>(settings, std::move(handlers))) {}
HttpServer::~HttpServer() = default;

std::uint16_t HttpServer::port() const {
  return impl_->port();
}
void HttpServer::run() {
  impl_->run();
}
void HttpServer::stop() {
  impl_->stop();
}

bool is_loopback(const std::string& host) {
  error_code error;
  const auto address = asio::ip::make_address(host, error);
  return host == "localhost" || (!error && address.is_loopback());
}

}  // namespace moba::app
